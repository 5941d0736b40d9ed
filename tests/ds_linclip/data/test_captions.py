"""Token ids are open_clip's, whatever a caption holds."""

import html
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data.captions import CaptionTokenizer, _subwords, decode_text
from ds_linclip.data.tar_index import BadSample
from helpers.labelled_folders import image, open_data, write_folder
from helpers.training_shards import NUM_SAMPLES, sound_samples, take, train_data, write_shards

ODD = [
    "a photo of a cat\n",
    "Tom &amp;amp; Jerry  \n at 50% off!!",
    "na\u00efve caf\u00e9 \u2615 \u6771\u4eac",
    "counterrevolutionaries internationalization " * 60,
    "&amp;lt;" * 200,
    "\u00c3\x85land",  # mojibake with white space or control characters in it
    "Pite\u00c3\xa5 voil\u00c3\xa0",
    "voil\u00c3 ",
    "\u00e3\x81\x95\u00e3\x81\x8f\u00e3\x82\x89",
    "a\x85b\x1cc\u2028d\xa0e",
    "\ufeffa cat",
    "\u0301\u0308",
    "&nbsp;a&#0;b&#x85;",
    "<start_of_text> a <end_of_text>",
    "x" * 1000,
    "x " * 3000,
]
ENCODINGS = ("latin-1", "windows-1252", "mac-roman", "cp437", "iso8859-2", "cp1251")
BLOCKS = [
    *((0x00, 0x1F), (0x20, 0x7E), (0x7F, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x52F)),
    *((0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F)),
    *((0x20A0, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF)),
    *((0xFB00, 0xFDFF), (0xFE00, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)),
    *((0xE0000, 0xE01EF), (0x10FF00, 0x10FFFF)),
]
JOINTS = [
    "",
    " ",
    "\n",
    "\r\n",
    "\x85",
    "\x1c",
    "\xa0",
    "\u2028",
    "\u200b",
    "&nbsp",
    "&#133;",
    "'S",
]


@cache
def open_clips(context_length: int = 77) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context_length)


@cache
def ours(context_length: int = 77) -> CaptionTokenizer:
    return CaptionTokenizer(context_length)


@cache
def vocabulary() -> list[str]:
    tokens = range(open_clips().vocab_size)
    return [open_clips().decoder[token].removesuffix("</w>") for token in tokens]


def mojibake(text: str, encoding: str) -> str:
    return text.encode().decode(encoding, "ignore")


def check(caption: str) -> None:
    """A caption has open_clip's ids, and is only refused when there are none."""
    expected = open_clips()(caption)
    if expected.count_nonzero() == 2:  # start and end
        with pytest.raises(BadSample, match="text_empty"):
            decode_text(caption.encode())
    else:
        assert torch.equal(ours()(decode_text(caption.encode())), expected), repr(caption)


@pytest.mark.parametrize("context_length", [8, 77])
def test_token_ids_are_open_clips(context_length: int) -> None:
    assert torch.equal(ours(context_length)(ODD), open_clips(context_length)(ODD))
    assert torch.equal(open_clips()(ODD), open_clip.get_tokenizer("ViT-B-16")(ODD))


@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.deferred(lambda: st.sampled_from(vocabulary())),
            st.builds(mojibake, st.text(max_size=20), st.sampled_from(ENCODINGS)),
            st.builds(lambda text: html.escape(html.escape(text)), st.text(max_size=20)),
            st.integers(0, 0x11FFFF).map("&#{};".format),
            st.sampled_from(JOINTS),
        ),
        max_size=40,
    ).map("".join)
)
def test_any_caption_has_open_clips_ids(caption: str) -> None:
    check(caption)


def drawn_caption(rng: random.Random) -> str:
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        first, last = rng.choice(BLOCKS)
        text = "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 9)))
        if rng.random() < 0.5:
            text = rng.choice(vocabulary())
        if rng.random() < 0.3:
            text = mojibake(text, rng.choice(ENCODINGS))
        if rng.random() < 0.1:
            text = html.escape(text)
        pieces += [text, rng.choice(JOINTS) if rng.random() < 0.3 else " "]
    return "".join(pieces)


@pytest.mark.slow
def test_a_hundred_thousand_captions_have_open_clips_ids() -> None:
    rng = random.Random(0)
    for _ in range(100_000):
        check(drawn_caption(rng))


@given(
    st.one_of(
        st.text("ab", min_size=1, max_size=200),
        st.text("the ", min_size=1, max_size=200),
        st.text(min_size=1, max_size=50),
        st.lists(st.deferred(lambda: st.sampled_from(vocabulary())), min_size=1).map("".join),
    )
)
def test_long_words_have_open_clips_subwords(word: str) -> None:
    letters = "".join(open_clips().byte_encoder[byte] for byte in word.encode())
    assert " ".join(_subwords(letters, open_clips().bpe_ranks)) == open_clips().bpe(letters)


@pytest.mark.parametrize("kind", ["letters", "lines", "mojibake"])
def test_longest_caption_is_tokenized_in_time(kind: str) -> None:
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 2**16)
    captions = {
        "letters": "".join(map(chr, letters)),
        "lines": "a\n" * 2**15,
        "mojibake": "\u00c3\x85" * 2**14,
    }
    began = time.process_time()
    ours()(decode_text(captions[kind].encode()))
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        *((b, "text_empty") for b in (b"", b" \n", b"&nbsp;", b"\0\x7f", "\ufeff\xa0".encode())),
        (b"\xff\xfea\0", "text_not_utf8"),  # UTF-16
        ("\u00fcber".encode("latin-1"), "text_not_utf8"),
        (b"&#" + b"9" * 5000 + b";", "text_undecodable"),
    ],
)
def test_bad_captions_are_named(content: bytes, cause: str) -> None:
    with pytest.raises(BadSample, match=cause):
        decode_text(content)


def test_odd_captions_reach_training_and_evaluation_as_they_are(tmp_path: Path) -> None:
    samples = sound_samples()
    captions = {key: ODD[i % len(ODD)] for i, key in enumerate(samples)}
    for key, caption in captions.items():
        samples[key]["txt"] = caption.encode()
    for batch in take(train_data(write_shards(tmp_path / "train", samples)), NUM_SAMPLES // 12):
        assert torch.equal(batch.texts, open_clips(6)([captions[key] for key in batch.keys]))
    held_out = tmp_path / "test"
    held_out.mkdir()
    write_folder(held_out, [{"jpg": image(), "cls": b"0", "txt": c.encode()} for c in ODD])
    assert [caption for batch in open_data(held_out) for caption in batch.captions] == ODD

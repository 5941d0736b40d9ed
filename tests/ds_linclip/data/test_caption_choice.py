"""Choice of captions: by weight, a pure function of seed and position, and nothing silent."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ds_linclip.config import CaptionSource, load_config
from ds_linclip.data.caption_choice import MAX_JSON_BYTES, CaptionChoice
from ds_linclip.data.captions import MAX_TEXT_BYTES
from ds_linclip.data.tar_index import BadSample, OpenShard
from helpers.tar_files import write_tar
from helpers.training_shards import (
    BATCH,
    NUM_SAMPLES,
    assert_same,
    sound_samples,
    take,
    train_data,
    write_shards,
)

_DRAWS = 4000


def chosen(
    tmp_path: Path, members: dict[str, bytes], sources: list[CaptionSource], draws: int = _DRAWS
) -> tuple[Counter[str], Counter[str]]:
    """Return how often each caption was drawn for one sample, and what was passed over."""
    choice = CaptionChoice(sources, seed=3)
    shard = opened(tmp_path, members, choice)
    found = [choice(shard, 0, position) for position in range(draws)]
    shard.close()
    passed_over = Counter(cause for caption in found for cause in caption.passed_over)
    return Counter(caption.text for caption in found), passed_over


def opened(tmp_path: Path, members: dict[str, bytes], choice: CaptionChoice) -> OpenShard:
    path = tmp_path / "0.tar"
    write_tar(path, [(f"0.{name}", content) for name, content in {"jpg": b"-", **members}.items()])
    return OpenShard(path.open("rb"), str(path), choice.members)


def document(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def assert_shares(found: Counter[str], **shares: float) -> None:
    """Check frequencies: five standard deviations of a draw, with a seed that is fixed."""
    assert set(found) == set(shares)
    for text, share in shares.items():
        deviation = (share * (1 - share) / found.total()) ** 0.5
        assert abs(found[text] / found.total() - share) <= 5 * deviation, (text, found)


def test_sources_are_drawn_by_weight_and_lists_uniformly(tmp_path: Path) -> None:
    members = {"txt": b"a", "syn.txt": b"b", "json": document(x={"y": ["c", "d"]})}
    sources = [
        CaptionSource(weight=2),
        CaptionSource(member="syn.txt", weight=1),
        CaptionSource(member="json", field="x.y", weight=5),
    ]
    found, passed_over = chosen(tmp_path, members, sources)
    assert_shares(found, a=2 / 8, b=1 / 8, c=5 / 16, d=5 / 16)
    assert not passed_over


def test_what_a_sample_lacks_leaves_the_ratios_of_the_rest(tmp_path: Path) -> None:
    sources = [
        CaptionSource(weight=2),
        CaptionSource(member="json", field="x", weight=3),
        CaptionSource(member="syn.txt", weight=1),
        CaptionSource(member="caption2", weight=1),
    ]
    members = {"txt": b"a", "caption2": b" \n", "syn.txt": b"b"}
    found, passed_over = chosen(tmp_path, members, sources)
    assert_shares(found, a=2 / 3, b=1 / 3)
    assert set(passed_over) == {"json.x/json_missing", "caption2/text_empty"}
    # Of all draws 3 in 7 meet the one that lacks first, others meet it after the other one.
    assert passed_over["json.x/json_missing"] > _DRAWS * 3 / 7 * 0.9


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("json", b"{", "json_undecodable"),
        ("json", b"[" * 100_000, "json_undecodable"),
        ("json", b'{"x": ' + b"9" * 10_000 + b"}", "json_undecodable"),
        ("json", b'{"x": "' + b"a" * MAX_JSON_BYTES + b'"}', "json_too_many_bytes"),
        ("json", document(x="a" * (MAX_TEXT_BYTES + 1)), "text_too_many_bytes"),
        ("json", document(y="a"), "json_entry_missing"),
        ("json", document(x=None), "json_entry_missing"),
        ("json", document(x=[]), "json_entry_missing"),
        ("json", b'["x"]', "json_entry_missing"),
        ("json", document(x=1), "json_entry_no_text"),
        ("json", document(x={"en": "a"}), "json_entry_no_text"),
        ("json", document(x=[[[["a"]]], True]), "json_entry_no_text"),
        ("json", document(x=["", " "]), "text_empty"),
        ("json", b'{"x": "\\ud83d"}', "text_not_utf8"),
        ("json", b"\xff\xff", "json_undecodable"),
        ("txt", b"-", "json_missing"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    source = CaptionSource(member="json", field="x")
    with pytest.raises(BadSample) as error:
        chosen(tmp_path, {name: content}, [source])
    assert error.value.cause == cause
    sources = [source, CaptionSource()]
    found, passed_over = chosen(tmp_path, {"txt": b"a", name: content}, sources, 20)
    assert len(found) == 1
    assert set(passed_over) == {f"json.x/{cause}"}


def test_a_list_of_a_million_bad_captions_costs_little(tmp_path: Path) -> None:
    content = b"[" + b"0," * (MAX_JSON_BYTES // 2 - 2) + b"0]"
    source = CaptionSource(member="json")
    members = {"json": content, "txt": b"a"}
    found, passed_over = chosen(tmp_path, members, [source, CaptionSource()], 3)
    assert set(found) == {"a"}
    assert set(passed_over) <= {"json/json_entry_no_text"}


def test_bad_entries_of_a_list_are_left_out_and_counted(tmp_path: Path) -> None:
    members = {"syn.json": b'["a", "", 7, "b"]'}
    found, passed_over = chosen(tmp_path, members, [CaptionSource(member="syn.json")])
    assert_shares(found, a=0.5, b=0.5)
    assert set(passed_over) == {"syn.json/text_empty", "syn.json/json_entry_no_text"}


def test_a_path_passes_through_lists(tmp_path: Path) -> None:
    members = {"json": document(annotations=[{"caption": "a"}, {"id": 1}, {"caption": ["b", "c"]}])}
    source = CaptionSource(member="json", field="annotations.caption")
    assert_shares(chosen(tmp_path, members, [source])[0], a=1 / 3, b=1 / 3, c=1 / 3)


@pytest.mark.parametrize(
    ("member", "field", "template", "expected"),
    [
        ("txt", None, "a photo of {caption}", "a photo of cat"),
        ("txt", None, "{caption}, {year}, {place.name}", "cat, 1999, Rome"),
        ("json", "alt", "{{{caption}}} {caption}", "{dog} dog"),
        ("json", None, "a {label} of {place.name} {score}", "a {caption} of Rome 0.5"),
    ],
)
def test_templates(
    tmp_path: Path, member: str, field: str | None, template: str, expected: str
) -> None:
    facts = document(year=1999, place={"name": "Rome"}, alt="dog", label="{caption}", score=0.5)
    source = CaptionSource(member=member, field=field, template=template)
    found, _ = chosen(tmp_path, {"txt": b"cat", "json": facts}, [source], 2)
    assert set(found) == {expected}


@pytest.mark.parametrize("value", [b"true", b"NaN", b"1e999", b'["a", "b"]', b"{}"])
def test_entries_of_a_template_must_be_texts_or_numbers(tmp_path: Path, value: bytes) -> None:
    source = CaptionSource(template="{caption} {x}")
    with pytest.raises(BadSample, match="json_entry_no_text"):
        chosen(tmp_path, {"txt": b"cat", "json": b'{"x": ' + value + b"}"}, [source], 1)


def test_the_first_cause_counts_where_no_caption_is_usable(tmp_path: Path) -> None:
    sources = [CaptionSource(), CaptionSource(member="json"), CaptionSource(member="b.txt")]
    choice = CaptionChoice(sources, seed=0)
    shard = opened(tmp_path, {"json": b"{"}, choice)
    causes = set()
    for position in range(50):
        with pytest.raises(BadSample) as error:
            choice(shard, 0, position)
        causes.add(error.value.cause)
    with pytest.raises(BadSample, match="shard_short"):
        choice(shard, 1, 0)
    shard.close()
    assert causes == {"text_missing"}


def test_further_members_belong_to_the_sample_they_extend(tmp_path: Path) -> None:
    """By name in any case; a sample may have a picture and further members only."""
    path = tmp_path / "0.tar"
    names = ("a.jpg", "a.SYN.txt", "a.seg.png", "a.seg.syn.txt", "a.txt", "b.c.jpg", "b.c.syn.txt")
    write_tar(path, [(name, name.encode()) for name in (*names, "d.caption2", "d.jpg")])
    shard = OpenShard(path.open("rb"), str(path), ("syn.txt", "caption2"))
    assert shard.keys == ["a", "a.seg", "b.c", "d"]
    assert shard.read(0, "text", max_bytes=99) == b"a.txt"
    assert shard.read(0, "syn.txt", max_bytes=99) == b"a.SYN.txt"
    assert shard.read(2, "syn.txt", max_bytes=99) == b"b.c.syn.txt"
    assert shard.read(3, "caption2", max_bytes=99) == b"d.caption2"
    with pytest.raises(BadSample, match="text_missing"):
        shard.find(2, "text", max_bytes=99)
    with pytest.raises(BadSample, match="text_too_many_bytes"):
        shard.find(2, "syn.txt", max_bytes=1)
    shard.close()


# From here on in whole batches.

SOURCES = [
    CaptionSource(weight=0.5),
    CaptionSource(member="json", field="syn", weight=0.5, template="a photo of {caption}"),
]


def recaptioned() -> dict[str, dict[str, bytes]]:
    samples = sound_samples()
    for number, parts in enumerate(samples.values()):
        parts["json"] = document(syn=[f"one {number}", f"two {number}"])
    return samples


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("recaptioned"), recaptioned())


def test_the_default_changes_nothing(patterns: list[str], tmp_path: Path) -> None:
    plain = take(train_data(write_shards(tmp_path / "plain", sound_samples())), 6)
    assert_same(take(train_data(patterns), 6), plain)
    assert_same(take(train_data(patterns, captions=[CaptionSource()]), 6), plain)
    chosen_ones = take(train_data(patterns, captions=SOURCES), 6)
    assert [b.keys for b in chosen_ones] == [b.keys for b in plain]
    assert all((a.images == b.images).all() for a, b in zip(plain, chosen_ones, strict=True))


def test_captions_depend_on_nothing_but_seed_and_position(patterns: list[str]) -> None:
    whole = take(train_data(patterns, captions=SOURCES), 10)
    assert_same(take(train_data(patterns, captions=SOURCES, num_workers=2), 10), whole)
    assert_same(take(train_data(patterns, captions=SOURCES), 3, 7), whole[7:])
    half = [
        take(train_data(patterns, captions=SOURCES, dp_rank=rank, dp_size=2), 10) for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        assert batch.captions == [caption for part in half for caption in part[step].captions]


def test_captions_differ_between_epochs_and_seeds(patterns: list[str]) -> None:
    steps = NUM_SAMPLES // BATCH
    of_epochs = [
        dict(zip(keys, captions, strict=True))
        for seed, start in ((0, 0), (0, steps), (1, 0))
        for batches in [take(train_data(patterns, captions=SOURCES, seed=seed), steps, start)]
        for keys in [[key for b in batches for key in b.keys]]
        for captions in [[caption for b in batches for caption in b.captions]]
    ]
    kinds = [{key: text.rpartition(" ")[0] for key, text in found.items()} for found in of_epochs]
    assert Counter(kinds[0].values()).keys() == {"picture", "a photo of one", "a photo of two"}
    for other in kinds[1:]:
        assert 10 < sum(kinds[0][key] != other[key] for key in other) < NUM_SAMPLES


def test_lacking_sources_are_counted_and_cost_no_sample(tmp_path: Path) -> None:
    samples = recaptioned()
    keys = list(samples)
    for key in keys[:10]:
        del samples[key]["json"]
    del samples[keys[1]]["txt"]
    batches = take(train_data(write_shards(tmp_path, samples), captions=SOURCES), 5)
    assert sum((Counter(b.skipped) for b in batches), Counter()) == {"text_missing": 1}
    passed_over = sum((Counter(b.captions_passed_over) for b in batches), Counter())
    assert set(passed_over) == {"json.syn/json_missing"}
    assert 1 <= passed_over.total() <= 9
    examples = {e for b in batches for e in b.captions_passed_over.examples.values()}
    assert all(example.endswith(f" of {tmp_path}/00000.tar") for example in examples)


def test_the_settings_are_part_of_the_identity(patterns: list[str]) -> None:
    plain = train_data(patterns).identity
    assert plain["data.captions"] == []
    assert train_data(patterns, captions=[CaptionSource()]).identity == plain
    assert train_data(patterns, captions=SOURCES).identity != plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{member: txt, weight: 0}]", r"captions\[0\].weight \(0.0\) must be greater than 0"),
        ("[txt, {member: b.txt, field: x}]", r"\[1\].field \(x\) needs a member that ends in json"),
        ("[{member: a.jpg}]", "must be no image and no class"),
        ("[{member: .txt}]", "must be what follows the key"),
        ("[{member: a/b.txt}]", "must be what follows the key"),
        ("[{member: json, field: a..b}]", "must be names of entries"),
        ("[{member: json, template: 'a {b'}]", "must have names in braces"),
        ("[{member: txt, template: 'a {b}'}]", r"must have \{caption\}"),
        ("[{member: json, template: ' '}]", "must not be empty"),
        ("[{members: json}]", "unknown key"),
        ("txt", "must be a list"),
    ],
)
def test_invalid_settings_are_named(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("embedded", [f"data.captions={value}", "data.train=['/a/0.tar']"])


def test_settings_are_read_from_a_command_line() -> None:
    text = "[txt, {member: syn.json, field: x.y, weight: 2, template: 'a {caption} of {b.c}'}]"
    config = load_config("embedded", [f"data.captions={text}", "data.train=['/a/0.tar']"])
    assert config.data.captions == [
        CaptionSource(),
        CaptionSource(member="syn.json", field="x.y", weight=2.0, template="a {caption} of {b.c}"),
    ]

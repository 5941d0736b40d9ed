"""Data sets as written: LAION's layout, reproducible bytes, and no leak of held-out samples."""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from ds_linclip.config import load_config
from ds_linclip.data.prepare import make_shards, synthetic_scenes
from ds_linclip.data.prepare.make_shards import make_digits, make_scenes
from ds_linclip.data.shard_index import expand
from linclip_launch.cli import main

META_FIELDS = [
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "sha256",
]


def read_tar(path: Path) -> list[dict[str, bytes]]:
    """Return the samples as webdataset reads them."""
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_small_scenes(out: Path, seed: int = 0) -> bool:
    return make_scenes(out, num_shards=2, samples_per_shard=5, image_size=48, seed=seed, num_test=8)


@pytest.fixture(scope="module")
def digit_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "out"
    assert make_digits(out)
    return out


def test_shards_have_the_layout_of_laion(digit_set: Path) -> None:
    total = 0
    for number in range(8):
        stem = digit_set / "train" / f"{number:05d}"
        samples = read_tar(stem.with_suffix(".tar"))
        stats = json.loads(Path(f"{stem}_stats.json").read_text())
        rows = pq.read_table(stem.with_suffix(".parquet")).to_pylist()
        assert stats["count"] == stats["successes"] == len(samples) == len(rows)
        assert stats["status_dict"] == {"success": len(samples)}
        for index, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            meta = json.loads(sample["json"])
            assert list(meta) == META_FIELDS
            assert meta == row
            assert sample["__key__"] == meta["key"] == f"{number:05d}{index:04d}"
            assert sample["txt"].decode() == meta["caption"]
            assert hashlib.sha256(sample["jpg"]).hexdigest() == meta["sha256"]
            assert (meta["width"], meta["height"]) == (32, 32)
            assert (meta["original_width"], meta["original_height"]) == (8, 8)
        total += len(samples)
    assert len(list((digit_set / "train").iterdir())) == 24
    assert total == 1437


def test_members_are_in_order(digit_set: Path) -> None:
    with tarfile.open(digit_set / "train" / "00003.tar") as tar:
        names = tar.getnames()[:4]
    assert names == ["000030000.jpg", "000030000.json", "000030000.txt", "000030001.jpg"]


def test_held_out_digits_never_occur_in_training(digit_set: Path) -> None:
    train = [s for n in range(8) for s in read_tar(digit_set / "train" / f"{n:05d}.tar")]
    test = read_tar(digit_set / "test" / "test" / "0.tar")
    hashes = [{hashlib.sha256(s["jpg"]).hexdigest() for s in part} for part in (train, test)]
    assert hashes[0].isdisjoint(hashes[1])
    sources = [{json.loads(s["json"])["url"] for s in part} for part in (train, test)]
    assert sources[0].isdisjoint(sources[1])
    assert len(sources[0] | sources[1]) == 1797
    # A fifth of each class, so that all classes have the same weight.
    assert len(test) == 360
    assert set(Counter(int(s["cls"]) for s in test).values()) <= {35, 36, 37}


def test_captions_vary_and_name_the_digit(digit_set: Path) -> None:
    words = (digit_set / "test" / "classnames.txt").read_text().split()
    samples = read_tar(digit_set / "test" / "test" / "0.tar")
    for sample in samples:
        label = int(sample["cls"])
        named = set(re.findall(r"\w+", sample["txt"].decode())) & {*words, *"0123456789"}
        assert named in ({words[label]}, {str(label)})
    patterns = {
        re.sub("|".join([*words, r"\d"]), "N", sample["txt"].decode()) for sample in samples
    }
    assert len(patterns) >= 20


def test_same_seed_gives_same_bytes(digit_set: Path, tmp_path: Path) -> None:
    assert make_digits(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(digit_set)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make_small_scenes(tmp_path / name, seed)
    a, b, c = (bytes_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["train/00000.tar"] != c["train/00000.tar"]


def test_complete_set_is_not_rewritten(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert make_small_scenes(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not make_small_scenes(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match=r"out \(.*\) must be empty or hold a complete data set"):
        make_digits(tmp_path)
    other = tmp_path / "scenes"
    make_small_scenes(other)
    with pytest.raises(ValueError, match=r"out \(.*\) must be empty: it holds .*'seed': 0"):
        make_small_scenes(other, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes", "thesis.txt"]


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.3)  # Ctrl-C after 0.3 s of work
        with pytest.raises(KeyboardInterrupt):
            make_scenes(
                tmp_path / "set", num_shards=1000, samples_per_shard=10, image_size=48, num_test=0
            )
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_command_line(tmp_path: Path) -> None:
    arguments = ["scenes", str(tmp_path / "set"), "--num-shards", "1", "--image-size", "32"]
    arguments += ["--samples-per-shard", "3"]
    command = [sys.executable, "-m", "linclip_launch", "shards", "make", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("set: written\n")
    assert "3/3" in done.stderr


def test_command_line_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scenes", str(tmp_path / "set"), "--num-shards", "1", "--image-size", "32"]
    assert main(["shards", "make", *arguments, "--samples-per-shard", "3"]) == 0
    assert main(["shards", "make", *arguments, "--samples-per-shard", "3"]) == 0
    assert capsys.readouterr().out.endswith("set: already complete\n")
    assert main(["shards", "make", *arguments, "--samples-per-shard", "4"]) == 2
    assert "error: out (" in capsys.readouterr().err
    assert main(["shards", "make", *arguments, "--samples-per-shard", "10001"]) == 2
    assert "samples_per_shard (10001) must be at most 10000" in capsys.readouterr().err


FOLDERS = (
    *(
        "photos",
        "it's",
        'say "x"',
        "a b",
        " lead",
        "trail ",
        "$HOME",
        "${HOME}",
        "a\\$b",
        "$(x)",
        "`x`",
        "!x",
    ),
    *(
        "{a,b}",
        "{1..3}",
        "}{",
        "{",
        "{}",
        "[x]",
        "a,b",
        "a: b",
        "a #b",
        "#x",
        "-",
        "--x",
        "~",
        "~x",
    ),
    *(
        "a\\b",
        "\\{",
        "a\nb",
        "\t",
        "\x85",
        "\u2028",
        "\ufeffx",
        "\x1b[31m",
        "ü",
        "日本",
        "😀",
        "e\u0301",
    ),
    *("%s", "*", "?", "&", "|", "a=b", "null", "007", "s3::x", "http:", "pipe:x", "@x"),
)


def test_printed_setting_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS:
        (word,) = shlex.split(make_shards._override(Path(folder) / "out", "{00000..00002}"))
        (source,) = load_config("embedded", [word]).data.train
        assert expand(source.shards, "data.train") == [
            f"{tmp_path}/{folder}/out/{number:05d}.tar" for number in range(3)
        ]


def test_folder_that_no_config_can_name_is_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    words = ["folder", str(tmp_path / "images"), str(tmp_path / "a\udcff")]
    assert main(["shards", "make", *words]) == 2
    assert "must be UTF-8, as config paths" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_summary_names_every_cause_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    picture = Image.new("RGB", (8, 8))
    for name in ("a.jpg", "a.png", "b.jpg"):
        picture.save(source / name)
    for name, text in (("a.txt", "a wall"), ("c\n.bmp", ""), ("d.bmp", ""), (".DS_Store", "")):
        (source / name).write_text(text)
    command = ["shards", "make", "folder", str(source), str(tmp_path / "it's")]
    table = [
        "passed over:",
        "    *.bmp                             2  c\\n.bmp",
        "    dot_file                          1  .DS_Store",
        "samples with the caption file of another one:",
        "    caption_shared                    1  a.png",
        shlex.quote(f'data.train=["{tmp_path}/it\'s/00000.tar"]'),
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"folder in {tmp_path}/it's: written, 2 samples, 1 failed, 3 passed over",
        "    text_missing                      1  b.jpg",
        *table,
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"folder in {tmp_path}/it's: already complete, 3 passed over",
        *table,
    ]


def test_scene_captions_compose_and_leave_pairs_out() -> None:
    captions = [
        synthetic_scenes.training_scene(i, image_size=16, seed=0).caption for i in range(1500)
    ]
    seen = {
        name for name in synthetic_scenes.CLASSNAMES if any(f" {name}" in text for text in captions)
    }
    unseen = set(synthetic_scenes.CLASSNAMES) - seen
    assert len(unseen) == 8
    unseen_labels = {
        synthetic_scenes.CLASSNAMES[sample.label]
        for sample in synthetic_scenes.labelled_scenes(
            "test_unseen", num_samples=16, image_size=16, seed=0
        )
    }
    assert unseen_labels == unseen
    assert any(" left of " in caption for caption in captions)
    assert any(caption.startswith("three large") for caption in captions)


@pytest.mark.parametrize("split", ["test", "test_unseen"])
def test_scene_shows_its_colour(split: str) -> None:
    colours = {"red": (214, 40, 40), "blue": (38, 90, 220), "black": (20, 20, 20)}
    checked = 0
    for sample in synthetic_scenes.labelled_scenes(split, num_samples=48, image_size=64, seed=0):
        colour = synthetic_scenes.CLASSNAMES[sample.label].split()[0]
        assert synthetic_scenes.CLASSNAMES[sample.label] in sample.caption
        if colour in colours:
            near = [
                pixel
                for pixel in sample.image.get_flattened_data()
                if all(abs(a - b) < 30 for a, b in zip(pixel, colours[colour], strict=True))
            ]
            assert 0.002 * 64**2 < len(near) < 0.2 * 64**2
            checked += 1
    assert checked >= 12

"""``linclip shards inspect``: every defect is counted under its cause, and nothing else is."""

import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_linclip.config import CacheConfig, NetworkConfig, Source
from ds_linclip.data.captions import MAX_TEXT_BYTES
from ds_linclip.data.prepare.inspect_shards import inspect_shards
from ds_linclip.data.remote import Storage
from ds_linclip.data.sample_reader import open_shard
from ds_linclip.data.shard_index import find_shards
from ds_linclip.data.transforms import MAX_IMAGE_BYTES
from linclip_launch.cli import main

COMMAND = Path(sys.executable).parent / "linclip"


def picture(width: int = 20, height: int = 10, form: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return the start of a PNG that claims a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def write_shard(
    path: Path, samples: list[tuple[str, dict[str, bytes]]], expected: int | None = None
) -> None:
    """Write a tar of these members, with statistics that expect all of them or another number."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    write_stats(path, len(samples) if expected is None else expected)


def write_stats(path: Path, successes: int) -> None:
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": successes}))


def sound(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"s{i}", {"jpg": picture(), "txt": b"one two three"}) for i in range(count)]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write seven shards with every defect and return their pattern."""
    folder = tmp_path_factory.mktemp("dirty")
    image, text = picture(), b"one two three"
    half = picture(100, 100)[:-1000]  # with an intact header
    write_shard(
        folder / "00000.tar",
        [
            ("fine", {"jpg": image, "txt": text}),
            ("long", {"png": picture(64, 48, "PNG", "L"), "txt": b"word " * 100}),
            ("cut", {"jpg": half, "txt": text}),
            ("junk", {"webp": b"no image", "txt": text}),
            ("tiny", {"png": picture(3, 30, "PNG"), "txt": text}),
            ("bomb", {"png": png_header(30_000, 30_000), "txt": text}),
            ("huge", {"jpg": bytes(MAX_IMAGE_BYTES + 1), "txt": text}),
            ("mute", {"jpg": image}),
            ("blind", {"txt": text}),
            ("blank", {"jpg": image, "txt": b" \n"}),
            ("latin", {"jpg": image, "txt": b"\xfcber"}),
            ("novel", {"jpg": image, "txt": b"x" * (MAX_TEXT_BYTES + 1)}),
            ("both", {"jpg": half, "txt": b""}),  # the text is read first
        ],
    )
    write_shard(folder / "00001.tar", sound(5), expected=7)
    write_shard(folder / "00002.tar", sound(4))
    with tarfile.open(folder / "00002.tar") as tar:
        place = tar.getmember("s3.txt").offset_data
    with open(folder / "00002.tar", "r+b") as file:
        file.truncate(place + 5)
    (folder / "00003.tar").write_bytes(b"garbage" * 1000)
    write_stats(folder / "00003.tar", 4)
    write_shard(folder / "00004.tar", [*sound(3), ("s1", {"jpg": image, "txt": text})])
    write_shard(folder / "00005.tar", sound(5), expected=3)
    (folder / "00006.tar").write_bytes(b"")
    write_stats(folder / "00006.tar", 3)
    return f"{folder}/{{00000..00006}}.tar"


@pytest.fixture(scope="module")
def dirty_report(dirty: str) -> dict[str, Any]:
    return inspect_shards([dirty])


def test_every_cause_is_counted_exactly(dirty_report: dict[str, Any]) -> None:
    causes = dirty_report["causes"]
    firsts = {cause: Path(counts.pop("first")).name for cause, counts in causes.items()}
    assert firsts["text_empty"] == firsts["shard_cut"].replace("00002", "00000")
    assert causes == {
        "image_missing": {"samples": 1, "shards": 1},
        "image_too_many_bytes": {"samples": 1, "shards": 1},
        "image_too_many_pixels": {"samples": 1, "shards": 1},
        "image_too_small": {"samples": 1, "shards": 1},
        "image_undecodable": {"samples": 2, "shards": 1},
        "keys_repeated": {"samples": 1, "shards": 1},
        "shard_cut": {"samples": 0, "shards": 1},
        "shard_long": {"samples": 2, "shards": 1},
        "shard_short": {"samples": 2, "shards": 1},
        "shard_unreadable": {"samples": 7, "shards": 2},
        "text_cut": {"samples": 1, "shards": 1},
        "text_empty": {"samples": 2, "shards": 1},
        "text_missing": {"samples": 1, "shards": 1},
        "text_not_utf8": {"samples": 1, "shards": 1},
        "text_too_many_bytes": {"samples": 1, "shards": 1},
    }
    # 13 + 7 + 4 + 4 + 4 + 3 + 3; 13 + 5 + 4 + 4 + 5; two of the last five are never read.
    assert dirty_report["samples"] == {"expected": 38, "found": 31, "read": 29, "usable": 17}
    assert dirty_report["shards"] == {"listed": 7, "inspected": 7, "unsized": 0}
    problems = {Path(problem["url"]).name: problem for problem in dirty_report["problems"]}
    assert problems["00001.tar"] == {
        "url": problems["00001.tar"]["url"],
        "cause": "shard_short",
        "samples": 2,
        "expected": 7,
        "found": 5,
    }
    assert [problems[name]["cause"] for name in sorted(problems)] == [
        "shard_short",
        "shard_cut",
        "shard_unreadable",
        "keys_repeated",
        "shard_long",
        "shard_unreadable",
    ]


def test_usable_samples_are_measured(dirty_report: dict[str, Any]) -> None:
    tokens = dirty_report["caption_tokens"]
    assert (tokens["min"], tokens["median"], tokens["max"]) == (5, 5, 102)
    assert (tokens["truncated"], tokens["truncated_share"]) == (1, 1 / 17)
    assert tokens["count"] == sum(tokens["counts"]) == 17
    characters = dirty_report["caption_characters"]
    assert (characters["min"], characters["max"]) == (13, 499)
    assert characters["mean"] == pytest.approx((16 * 13 + 499) / 17)
    assert dirty_report["image_sizes"] == [[20, 10, 16], [64, 48, 1]]
    assert (dirty_report["image_width"]["min"], dirty_report["image_width"]["max"]) == (20, 64)
    assert (dirty_report["image_height"]["min"], dirty_report["image_height"]["max"]) == (10, 48)
    assert dirty_report["image_bytes"]["median"] == len(picture())
    assert sum(dirty_report["image_bytes"]["counts"]) == 17
    assert dirty_report["formats"] == {"JPEG": 16, "PNG": 1}
    assert dirty_report["modes"] == {"RGB": 16, "L": 1}


def test_report_does_not_depend_on_workers(dirty: str) -> None:
    reports = [inspect_shards([dirty], num_workers=workers) for workers in (1, 2)]
    for report in reports:
        assert report.pop("throughput")["samples_per_second"] > 0
    assert json.dumps(reports[0]) == json.dumps(reports[1])


def test_without_decoding_only_headers_are_checked(dirty: str) -> None:
    report = inspect_shards([dirty], decode=False)
    assert report["causes"]["image_undecodable"]["samples"] == 1  # the cut one goes unnoticed
    assert report["causes"]["image_too_small"]["samples"] == 1
    assert report["samples"]["usable"] == 18


def test_limits_take_an_even_part(tmp_path: Path) -> None:
    for number in range(10):
        samples = [
            (f"s{i}", {"jpg": picture(10 + number, 10), "txt": b"w " * (i + 1)}) for i in range(8)
        ]
        write_shard(tmp_path / f"{number:05d}.tar", samples)
    pattern = f"{tmp_path}/{{00000..00009}}.tar"
    report = inspect_shards([pattern], max_shards=5, max_samples=11)
    assert report["shards"] == {"listed": 10, "inspected": 5, "unsized": 0}
    assert report["samples"] == {"expected": 40, "found": 40, "read": 11, "usable": 11}
    assert {width for width, *_ in report["image_sizes"]} == {10, 12, 14, 16, 18}
    assert report["caption_tokens"]["max"] >= 7  # not the first samples only
    assert report["causes"] == {}


def test_shards_are_checked_as_in_training(dirty: str, dirty_report: dict[str, Any]) -> None:
    storage = Storage(CacheConfig(), NetworkConfig())
    in_training = [
        (problem.url, problem.cause, problem.found, problem.expected)
        for group in find_shards([Source(shards=dirty)], storage)
        for shard in group.shards
        for problem in open_shard(shard, storage)[1]
    ]
    fields = ("url", "cause", "found", "expected")
    assert in_training == [
        tuple(problem[f] for f in fields) for problem in dirty_report["problems"]
    ]


def write_unsized(folder: Path) -> str:
    """Write a sound, a cut and a garbage shard without statistics and return their pattern."""
    for number in range(3):
        write_shard(folder / f"{number}.tar", sound(4))
        (folder / f"{number}_stats.json").unlink()
    with open(folder / "1.tar", "r+b") as file:
        file.truncate(1700)
    (folder / "2.tar").write_bytes(b"garbage" * 1000)
    return f"{folder}/{{0..2}}.tar"


def test_shards_without_a_stated_size_are_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_unsized(tmp_path)
    assert (
        main(["shards", "inspect", pattern, "--out", str(tmp_path / "report"), "--workers", "1"])
        == 0
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["shards"] == {"listed": 3, "inspected": 3, "unsized": 3}
    assert report["samples"] == {"expected": 5, "found": 5, "read": 5, "usable": 4}
    assert report["causes"] == {
        "shard_cut": {"samples": 0, "shards": 1, "first": f"{tmp_path}/1.tar"},
        "shard_unreadable": {"samples": 0, "shards": 1, "first": f"{tmp_path}/2.tar"},
        "text_missing": {"samples": 1, "shards": 1, "first": f"s0 of {tmp_path}/1.tar"},
    }
    assert "3 shards have neither sizes.json nor _stats.json" in capsys.readouterr().out
    assert not (tmp_path / "sizes.json").exists()


def test_what_is_passed_over_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"jpg": picture(), "seg.png": b"-", "npy": b"-", "txt": b"one"}
    samples = [(f"{i}", parts) for i in range(6)] + [(f"._{i}", {"jpg": b"-"}) for i in range(6)]
    write_shard(tmp_path / "0.tar", samples, expected=6)
    by_extension = [(f"{i}", {end: parts[end]}) for end in ("jpg", "txt") for i in range(6)]
    write_shard(tmp_path / "1.tar", by_extension, expected=6)
    write_shard(tmp_path / "2.tar", [], expected=0)
    write_shard(tmp_path / "3.tar", [], expected=2)
    arguments = [f"{tmp_path}/{{0..3}}.tar", "--out", str(tmp_path / "report"), "--workers", "1"]
    assert main(["shards", "inspect", *arguments]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["samples"] == {"expected": 14, "found": 12, "read": 12, "usable": 6}
    assert report["causes"] == {
        "members_apart": {"samples": 6, "shards": 1, "first": f"0 of {tmp_path}/1.tar"},
        "shard_empty": {"samples": 2, "shards": 1, "first": f"{tmp_path}/3.tar"},
    }
    firsts = {"hidden": "._0.jpg", "extension": "0.npy", "surplus": "0.seg.png"}
    assert report["passed_over"] == {
        f"member_{kind}": {"members": 6, "shards": 1, "first": f"{first} of {tmp_path}/0.tar"}
        for kind, first in firsts.items()
    }
    assert "members of a sample must stand together" in text
    assert re.search(r"^member_surplus +6 +1  0\.seg\.png of /", text, re.M)


def test_names_that_no_terminal_shows_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "0.tar", [("\x1b[31m\n\udce4", {"jpg": picture(), "txt": b""})])
    arguments = [f"{tmp_path}/0.tar", "--out", str(tmp_path / "report"), "--workers", "1"]
    assert main(["shards", "inspect", *arguments]) == 0
    assert rf"\x1b[31m\n\udce4 of {tmp_path}/0.tar" in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [1, 2])
def test_sizes_of_whole_shards_are_written(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    patterns = [write_unsized(tmp_path / "a"), f"file://{tmp_path}/b/{{0..3}}.tar"]
    write_shard(tmp_path / "b" / "0.tar", [*sound(3), sound(1)[0]])  # a key twice
    write_shard(tmp_path / "b" / "1.tar", sound(5), expected=7)
    write_shard(tmp_path / "b" / "2.tar", sound(6))
    write_shard(tmp_path / "b" / "3.tar", sound(2), expected=1)
    before = {"1.tar": 7, "9.tar": 30}
    (tmp_path / "b" / "sizes.json").write_text(json.dumps(before))
    report = inspect_shards(patterns, write_sizes=True, decode=False, num_workers=num_workers)
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {"0.tar": 4}
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {
        "0.tar": 4,
        "1.tar": 7,
        "2.tar": 6,
        "9.tar": 30,
    }
    assert report["sizes_files"] == {
        f"{tmp_path}/a/sizes.json": {"shards": 3, "written": 1},
        f"{tmp_path}/b/sizes.json": {"shards": 4, "written": 2},
    }
    assert not list(tmp_path.glob("*/.*"))
    [group] = find_shards(
        [Source(shards=f"{tmp_path}/b/{{0..3}}.tar")], Storage(CacheConfig(), NetworkConfig())
    )
    assert [shard.num_samples for shard in group.shards] == [4, 7, 6, 1]


def test_failed_write_keeps_the_old_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "0.tar", sound(2))
    (tmp_path / "sizes.json").write_text('{"1.tar": 3}')

    def refuse(source: Path, target: Path) -> None:
        assert json.loads(source.read_text()) == {"0.tar": 2, "1.tar": 3}
        raise OSError("the disk is gone")

    monkeypatch.setattr("os.replace", refuse)
    arguments = [f"{tmp_path}/0.tar", "--write-sizes", "--workers", "1"]
    assert main(["shards", "inspect", *arguments, "--out", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the disk is gone"
    assert (tmp_path / "sizes.json").read_text() == '{"1.tar": 3}'
    names = ["0.tar", "0_stats.json", "report", "sizes.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.long
def test_command_writes_report_and_figure(dirty: str, tmp_path: Path) -> None:
    arguments = [
        "shards",
        "inspect",
        dirty,
        "--out",
        str(tmp_path / "a" / "report"),
        "--workers",
        "2",
    ]
    done = subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "38 samples expected, 31 found, 29 read, 17 usable" in done.stdout
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["shard_unreadable", "7", "2"] in [words[:3] for words in table]
    assert ["image_width", "20", "20", "64", "64"] in table
    assert "captions over 77 tokens: 5.88%" in done.stdout
    assert "7/7" in done.stderr
    report = json.loads((tmp_path / "a" / "report" / "report.json").read_text())
    assert report["samples"]["usable"] == 17
    with Image.open(tmp_path / "a" / "report" / "report.png") as figure:
        assert figure.size == (1320, 888)
        grey = np.asarray(figure.convert("L"))
        halves = [half for rows in np.array_split(grey, 2) for half in np.array_split(rows, 2, 1)]
    assert all((half < 160).mean() > 0.01 for half in halves)  # no panel is empty


def test_shards_without_usable_samples_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "00000.tar").write_bytes(b"garbage" * 1000)
    write_stats(tmp_path / "00000.tar", 4)
    arguments = [f"{tmp_path}/00000.tar", "--out", str(tmp_path / "report"), "--workers", "1"]
    assert main(["shards", "inspect", *arguments]) == 0
    assert "no usable sample" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing.tar --out report", "(nothing.tar) matches no file"),
        ("{00000..00001}.tar --out report", "1 of 2 are missing, first 00001.tar"),
        ("pipe:cat --out report", "pipe:cat"),
        ("00000.tar --out file", "file"),
        ("00000.tar --out report --write-sizes --max-shards 1", "max_shards (1) must be left out"),
        ("00000.tar --out report --write-sizes --max-samples 9", "max_samples (9) must be left"),
        ("00000.tar https://a.b/0.tar --out report --write-sizes", "write_sizes needs local"),
    ],
)
def test_mistakes_are_one_line_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "00000.tar", sound(1))
    (tmp_path / "file").write_text("no folder")
    assert main(["shards", "inspect", *arguments.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.long
def test_command_exits_with_2_for_a_mistake(tmp_path: Path) -> None:
    command = [str(COMMAND), "shards", "inspect", "nothing.tar", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_captions_are_read_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = picture()
    samples = [(f"{i:03d}", {"jpg": image, "json": b'{"syn": ["one", ""]}'}) for i in range(40)]
    samples[0] = ("000", {"jpg": image, "json": b"{"})
    write_shard(tmp_path / "0.tar", samples)
    arguments = ["shards", "inspect", str(tmp_path / "0.tar"), "--out", str(tmp_path / "report")]
    sources = "[{member: json, field: syn, template: 'a {caption}'}]"
    assert main([*arguments, "--workers", "1", "--captions", sources]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["samples"]["usable"] == 39
    assert {cause: each["samples"] for cause, each in report["causes"].items()} == {
        "json_undecodable": 1
    }
    assert report["caption_characters"]["max"] == len("a one")
    assert report["captions_passed_over"] == {}
    sources = "[{member: json, field: syn}, {member: syn.txt}]"
    assert main([*arguments, "--workers", "1", "--captions", sources]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    passed_over = report["captions_passed_over"]
    assert passed_over.keys() == {"json.syn/text_empty", "syn.txt/text_missing"}
    assert report["caption_characters"]["max"] == len("one")
    assert "another one taken" in capsys.readouterr().out
    assert main([*arguments, "--captions", "[{member: json, weight: 0}]"]) == 2
    assert "data.captions[0].weight (0.0) must be greater than 0" in capsys.readouterr().err

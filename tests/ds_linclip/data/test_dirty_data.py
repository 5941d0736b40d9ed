"""Dirty training data: bad samples and shards are replaced and counted, and cost nothing."""

import io
import multiprocessing
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from ds_linclip.data import DataError
from helpers.tar_files import write_tar
from helpers.training_shards import (
    BATCH,
    NUM_SAMPLES,
    NUM_SHARDS,
    jpeg,
    sound_samples,
    take,
    train_data,
    write_shards,
)


def png_bomb() -> bytes:
    """A small file whose header announces 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def make_dirty(samples: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """Break samples in place; returns the cause under which each must be counted."""
    causes = {
        3: "image_undecodable",
        4: "text_missing",
        17: "text_empty",
        18: "image_missing",
        19: "text_not_utf8",
        44: "image_undecodable",
        45: "text_too_many_bytes",
        50: "image_too_many_pixels",
        59: "image_too_small",
    }
    keys = list(samples)
    samples[keys[3]]["jpg"] = samples[keys[3]]["jpg"][:-100]
    del samples[keys[4]]["txt"]
    samples[keys[17]]["txt"] = b" \n"
    del samples[keys[18]]["jpg"]
    samples[keys[19]]["txt"] = b"\xff\xfe\xfd"
    samples[keys[44]]["jpg"] = b"<html>not found</html>"
    samples[keys[45]]["txt"] = b"x" * 100_000
    tiny = io.BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "JPEG")
    samples[keys[59]]["jpg"] = tiny.getvalue()
    samples[keys[50]]["png"] = png_bomb()
    del samples[keys[50]]["jpg"]
    # Unusual, but sound.
    samples[keys[20]]["jpg"] = jpeg(20, "L")
    samples[keys[21]]["jpg"] = jpeg(21, "CMYK")
    for number, mode, file_format in (
        *((22, "RGBA", "PNG"), (23, "P", "PNG"), (24, "P", "GIF"), (25, "RGBA", "WEBP")),
        *((26, "I;16", "PNG"), (27, "LA", "PNG"), (28, "1", "PNG")),
    ):
        samples[keys[number]]["jpg"] = jpeg(number, mode, file_format)
    items = [("a.dotted.key" if key == keys[29] else key, parts) for key, parts in samples.items()]
    samples.clear()
    samples.update(items)
    return {keys[number]: cause for number, cause in causes.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(tmp_path: Path, num_workers: int) -> None:
    samples = sound_samples()
    causes = make_dirty(samples)
    data = train_data(write_shards(tmp_path, samples), num_workers=num_workers)
    batches = take(data, NUM_SAMPLES // BATCH)
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    assert skipped == Counter(causes.values())
    seen = Counter(key for batch in batches for key in batch.keys)
    assert seen.total() == NUM_SAMPLES
    assert set(seen) == set(samples) - set(causes)
    # The next good sample of the same shard; 59 is the last of its shard, whose first is 45.
    replacements = [5, 5, 20, 20, 20, 30, 46, 46, 51]
    assert seen - Counter(set(seen)) == Counter(f"{number:09d}" for number in replacements)


def test_keys_that_come_twice_are_both_kept_and_reported(tmp_path: Path) -> None:
    patterns = write_shards(tmp_path, sound_samples())
    with tarfile.open(tmp_path / "00001.tar") as tar:
        contents = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "00001.tar", "w") as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name.replace("000000016", "000000015"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    batches = take(train_data(patterns), NUM_SAMPLES // BATCH)
    seen = Counter(key for batch in batches for key in batch.keys)
    assert seen["000000015"] == 2
    assert {caption for batch in batches for caption in batch.captions} == {
        f"picture {number}" for number in range(NUM_SAMPLES)
    }
    problems = {p for batch in batches for p in batch.problems}
    assert [(p.cause, p.found, p.expected) for p in problems] == [("keys_repeated", 15, 14)]


def test_members_that_are_apart_or_no_samples_are_counted(tmp_path: Path) -> None:
    """One shard by extension, one with other files; the statistics count the samples."""
    patterns = write_shards(tmp_path, sound_samples())
    for number in (0, 1):
        path = tmp_path / f"0000{number}.tar"
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        if number == 0:
            members.sort(key=lambda member: member[0][-3:])
        else:
            keys = dict.fromkeys(name.partition(".")[0] for name, _ in members)
            others = [(f"{key}.seg.png", b"-") for key in keys] + [
                (f"._{key}.jpg", b"-") for key in keys
            ]
            members = sorted(members + others)
        write_tar(path, members)
    batches = take(train_data(patterns), NUM_SAMPLES // BATCH)
    assert sum((batch.skipped for batch in batches), Counter()) == {"members_apart": 15}
    firsts = [first for batch in batches for first in batch.skipped.examples.values()]
    assert all(first.endswith(f" of {tmp_path}/00000.tar") for first in firsts)
    seen = {int(key) for batch in batches for key in batch.keys}
    assert seen == set(range(15, 60))
    problems = {(p.cause, p.found, p.first) for b in batches for p in b.problems}
    assert problems == {
        ("member_hidden", 15, "._000000015.jpg"),
        ("member_surplus", 15, "000000015.seg.png"),
    }


def peak_and_skipped(patterns: Sequence[str]) -> tuple[float, float, dict[str, int]]:
    """MiB and CPU seconds of the most expensive sample of an epoch, and what was skipped."""
    batches = train_data(patterns, global_batch_size=1).batches(0)
    next(batches)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now

    def high_water() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    memory, slowest, skipped = high_water(), 0.0, Counter[str]()
    for _ in range(NUM_SAMPLES - 1):
        began = time.process_time()
        skipped.update(next(batches).skipped)
        slowest = max(slowest, time.process_time() - began)
    return high_water() - memory, slowest, dict(skipped)


@pytest.mark.long
def test_bomb_and_huge_caption_cost_nothing(tmp_path: Path) -> None:
    rejected = sound_samples()
    keys = list(rejected)
    rejected[keys[0]] = {"png": png_bomb(), "txt": b"a bomb"}
    rejected[keys[1]]["txt"] = b"x" * 50_000_000
    allowed = sound_samples()
    buffer = io.BytesIO()
    Image.new("RGBA", (4096, 4096)).save(buffer, "PNG")
    allowed[keys[0]] = {"png": buffer.getvalue(), "txt": b"a bomb just under the limits"}
    # In a process of its own, where nothing else uses memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory, slowest, skipped = pool.apply(
            peak_and_skipped, (write_shards(tmp_path / "rejected", rejected),)
        )
        assert skipped == {"image_too_many_pixels": 1, "text_too_many_bytes": 1}
        assert slowest < 0.1
        assert memory < 20
        memory, slowest, skipped = pool.apply(
            peak_and_skipped, (write_shards(tmp_path / "allowed", allowed),)
        )
        assert skipped == {}
        assert slowest < 3
        assert 60 < memory < 300


def test_cut_and_lost_shards_are_replaced_and_counted(tmp_path: Path) -> None:
    patterns = write_shards(tmp_path, sound_samples())
    first = tmp_path / "00000.tar"
    with tarfile.open(first) as tar:
        members = tar.getmembers()
    # The image of sample 10 loses its end, samples 11 ... 14 are gone.
    first.write_bytes(first.read_bytes()[: members[20].offset_data + 50])
    (tmp_path / "00002.tar").write_bytes(b"garbage" * 1000)
    batches = take(train_data(patterns), NUM_SAMPLES // BATCH)
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    # Sample 10 has lost its text too, and that is looked at first.
    assert skipped == {"text_missing": 1, "shard_short": 4, "shard_unreadable": 15}
    seen = {int(key) for batch in batches for key in batch.keys}
    assert seen == {*range(10), *range(15, 30), *range(45, 60)}
    problems = {
        (Path(p.url).name, p.cause, p.found, p.expected) for b in batches for p in b.problems
    }
    assert problems == {
        ("00000.tar", "shard_cut", 11, 15),
        ("00002.tar", "shard_unreadable", 0, 15),
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_bad_is_an_error(tmp_path: Path, num_workers: int) -> None:
    samples = sound_samples()
    for parts in samples.values():
        parts["txt"] = b""
    data = train_data(write_shards(tmp_path, samples), num_workers=num_workers)
    with pytest.raises(
        DataError, match=r"data\.train .* 60 candidates .* first cause text_empty\)"
    ) as caught:
        take(data, 1)
    assert "Traceback" not in str(caught.value)


def test_shard_lost_while_training_is_counted(tmp_path: Path) -> None:
    patterns = write_shards(tmp_path, sound_samples())
    data = train_data(patterns)
    (tmp_path / "00001.tar").unlink()
    batches = take(data, NUM_SAMPLES // BATCH)
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    assert skipped == {"shard_missing": 15}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failing_file_system_ends_the_run(tmp_path: Path, num_workers: int) -> None:
    """The start of a process' memory cannot be read: the kernel answers EIO."""
    patterns = write_shards(tmp_path, sound_samples())
    data = train_data(patterns, num_workers=num_workers)
    for number in range(NUM_SHARDS):
        (tmp_path / f"{number:05d}.tar").unlink()
        (tmp_path / f"{number:05d}.tar").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"data\.train .*0000\d\.tar.*Input/output error"):
        take(data, 1)

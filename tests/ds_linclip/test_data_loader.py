"""Training batches: bit-identical for every layout and start, bad samples replaced and counted."""

import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ds_linclip.config import (
    Config,
    DataConfig,
    ModelConfig,
    Resolution,
    Source,
    TextTower,
    TrainConfig,
    VisionTower,
)
from ds_linclip.data import Batch, DataError, Storage, TrainData, find_shards

NUM_SAMPLES = 60
NUM_SHARDS = 4
BATCH = 12


def jpeg(number: int, mode: str = "RGB", file_format: str = "JPEG") -> bytes:
    """A picture of its own for every number."""
    pixels = np.random.default_rng(number).integers(256, size=(3, 3, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16)).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def png_bomb() -> bytes:
    """A small file whose header announces 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def sound_samples() -> dict[str, dict[str, bytes]]:
    return {
        f"{number:09d}": {"jpg": jpeg(number), "txt": f"picture {number}".encode()}
        for number in range(NUM_SAMPLES)
    }


def write_shards(folder: Path, samples: dict[str, dict[str, bytes]]) -> list[str]:
    """Deal the samples to shards in blocks; the statistics count them all."""
    folder.mkdir(exist_ok=True)
    size = NUM_SAMPLES // NUM_SHARDS
    items = list(samples.items())
    for number in range(NUM_SHARDS):
        block = items[number * size : (number + 1) * size]
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key, parts in block:
                for extension, content in parts.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": len(block)}))
    return [f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"]


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), sound_samples())


def train_data(
    patterns: Sequence[str | Source],
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    global_batch_size: int = BATCH,
    lower_limits: Callable[[], None] | None = None,
    **data: Any,
) -> TrainData:
    sources = [Source(shards=p) if isinstance(p, str) else p for p in patterns]
    config = Config(
        data=DataConfig(
            train=sources, crop_scale=(0.5, 1.0), **{"shuffle_shards": 2, "num_workers": 0, **data}
        ),
        model=ModelConfig(
            vision=VisionTower(image_size=(8, 8), patch_size=4), text=TextTower(context_length=6)
        ),
        train=TrainConfig(global_batch_size=global_batch_size, seed=seed, steps=100),
    )
    groups = find_shards(sources, Storage(config.data.cache, config.data.network))
    if lower_limits is not None:
        lower_limits()
    return TrainData(config, groups, dp_rank=dp_rank, dp_size=dp_size)


def take(data: TrainData, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(data.batches(start), count))


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys == b.keys
        assert a.captions == b.captions
        assert a.skipped == b.skipped
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.texts, b.texts)


def test_batch_holds_what_it_says(patterns: list[str]) -> None:
    data = train_data(patterns)
    assert data.order.num_samples == NUM_SAMPLES
    (batch,) = take(data, 1)
    assert batch.images.shape == (BATCH, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.texts.shape == (BATCH, 6)
    assert batch.texts.dtype == torch.int64
    assert (batch.texts[:, 0] == 49406).all()
    assert batch.captions == [f"picture {int(key)}" for key in batch.keys]
    assert batch.skipped == {}
    assert batch.problems == []
    moved = next(data.batches(0, "meta"))
    assert moved.images.device.type == moved.texts.device.type == "meta"
    assert moved.keys == batch.keys


def test_epoch_holds_every_sample_once_and_crops_differ(patterns: list[str]) -> None:
    steps = NUM_SAMPLES // BATCH
    batches = take(train_data(patterns), 2 * steps)
    images: list[dict[str, torch.Tensor]] = []
    for epoch in range(2):
        part = batches[epoch * steps : (epoch + 1) * steps]
        pairs = [pair for batch in part for pair in zip(batch.keys, batch.images, strict=True)]
        assert sorted(key for key, _ in pairs) == sorted(sound_samples())
        images.append(dict(pairs))
    assert [b.keys for b in batches[:steps]] != [b.keys for b in batches[steps:]]
    assert not any(torch.equal(images[0][key], images[1][key]) for key in images[0])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_workers_change_nothing(patterns: list[str], num_workers: int) -> None:
    expected = take(train_data(patterns), 7)
    assert_same(take(train_data(patterns, num_workers=num_workers), 7), expected)


def test_slow_reader_keeps_its_batches(patterns: list[str]) -> None:
    """Workers write into the same few buffers in turn, never into one that is still to be read."""
    expected = take(train_data(patterns), 12)
    data = train_data(patterns, num_workers=2, prefetch_batches=1)
    found = []
    for batch in itertools.islice(data.batches(0), 12):
        time.sleep(0.05)
        found.append(batch)
    assert_same(found, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_bit_identical(patterns: list[str], num_workers: int) -> None:
    through = take(train_data(patterns), 9)
    for start in (3, 7):  # in the middle of the first and of the second epoch
        resumed = train_data(patterns, num_workers=num_workers)
        assert_same(take(resumed, 9 - start, start), through[start:])


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_ranks_share_the_same_global_batches(patterns: list[str], num_lanes: int) -> None:
    whole = take(train_data(patterns, num_lanes=num_lanes), 6)
    for dp_size in (2, 4):
        parts = [
            take(train_data(patterns, num_lanes=num_lanes, dp_rank=rank, dp_size=dp_size), 6)
            for rank in range(dp_size)
        ]
        joined = [
            Batch(
                images=torch.cat([batch.images for batch in step]),
                texts=torch.cat([batch.texts for batch in step]),
                keys=[key for batch in step for key in batch.keys],
                captions=[caption for batch in step for caption in batch.captions],
            )
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_generators_are_untouched(patterns: list[str], num_workers: int) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    take(train_data(patterns, num_workers=num_workers), 2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[union-attr]


def test_seed_changes_order_and_crops(patterns: list[str]) -> None:
    steps = 4 * NUM_SAMPLES // BATCH
    first, second = (
        [
            pair
            for batch in take(train_data(patterns, seed=seed), steps)
            for pair in zip(batch.keys, batch.images, strict=True)
        ]
        for seed in (0, 1)
    )
    assert [key for key, _ in first] != [key for key, _ in second]
    # A crop depends on the position too: the same key at the same position, by chance.
    same = [(a, b) for a, b in zip(first, second, strict=True) if a[0] == b[0]]
    assert same
    assert not any(torch.equal(mine, other) for (_, mine), (_, other) in same)


def test_workers_end_with_the_iterator(patterns: list[str]) -> None:
    before = set(multiprocessing.active_children())
    batches = train_data(patterns, num_workers=2).batches(0)
    assert isinstance(batches, Iterator)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del batches
    assert not workers & set(multiprocessing.active_children())


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


def peak_and_skipped(patterns: Sequence[str]) -> tuple[float, float, dict[str, int]]:
    """MiB and CPU seconds that the dearest sample of an epoch takes, and what was skipped."""
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


def test_fewer_shards_than_readers(tmp_path: Path) -> None:
    patterns = write_shards(tmp_path, sound_samples())
    one_shard = [patterns[0].replace("{00000..00003}", "00002")]
    whole = take(train_data(one_shard, num_lanes=8), 5)
    assert len({key for batch in whole for key in batch.keys}) == NUM_SAMPLES // NUM_SHARDS
    for rank in range(4):
        part = train_data(one_shard, num_lanes=8, num_workers=2, dp_rank=rank, dp_size=4)
        for step, batch in enumerate(take(part, 5)):
            assert batch.keys == whole[step].keys[3 * rank : 3 * rank + 3]


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


def test_low_file_limit_replaces_no_sample(patterns: list[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_file = os.open(os.devnull, os.O_RDONLY)
    os.close(next_file)
    expected = take(train_data(patterns), NUM_SAMPLES // BATCH)

    def no_more_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, limits[1]))

    try:
        data = train_data(patterns, num_workers=1, lower_limits=no_more_files)
        batches = take(data, NUM_SAMPLES // BATCH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_same(batches, expected)


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


def test_open_files_are_bounded(tmp_path: Path) -> None:
    patterns = []
    for number in range(10):
        folder = tmp_path / str(number)
        patterns += write_shards(folder, sound_samples())
    data = train_data(patterns, shuffle_shards=1)
    before = len(os.listdir("/proc/self/fd"))
    for batch in itertools.islice(data.batches(0), 10 * NUM_SAMPLES // BATCH):
        assert len(batch.keys) == BATCH
        assert len(os.listdir("/proc/self/fd")) - before <= 5
    del data
    assert len(os.listdir("/proc/self/fd")) == before


def test_shards_of_past_pools_are_closed(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / name, sound_samples())[0] for name in "ab"]
    batches = train_data(folders, global_batch_size=10).batches(0)
    before = len(os.listdir("/proc/self/fd"))
    opened = []
    for _ in range(12):  # four pools of two shards, 30 samples each
        next(batches)
        opened.append(len(os.listdir("/proc/self/fd")) - before)
    assert opened == [2] * 12


def test_shards_of_unknown_size_are_read_in_turn(tmp_path: Path) -> None:
    """Sizes 20 and 10, said to be 15 each: no sample counts as bad, none is asked for in vain."""
    samples = list(sound_samples().items())[:30]
    for number, part in enumerate((samples[:20], samples[20:])):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as tar:
            for key, parts in part:
                tar.write({"__key__": key, **parts})
    source = Source(shards=f"{tmp_path}/{{0..1}}.tar", num_samples=30)
    batches = take(train_data([source], global_batch_size=10), 3)
    seen = Counter(int(key) for batch in batches for key in batch.keys)
    assert set(seen) == {*range(15), *range(20, 30)}
    assert max(seen.values()) == 2
    assert not any(batch.skipped or batch.problems for batch in batches)


def test_swapped_sources_are_told_apart(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name, sound_samples())[0] for name in "ab")
    one = train_data([Source(shards=first, weight=1), Source(shards=second, weight=1)])
    two = train_data([Source(shards=second, weight=1), Source(shards=first, weight=1)])
    assert one.order.fingerprint == two.order.fingerprint
    assert one.identity != two.identity


def test_shared_memory_that_does_not_suffice_is_named(patterns: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"data\.prefetch_batches \(1000000000\) must fit .* --shm-size"
    ):
        train_data(patterns, num_workers=1, prefetch_batches=10**9)


def test_resolution_follows_the_step(patterns: list[str]) -> None:
    stages = [
        Resolution(from_step=0, image_size=(8, 8)),
        Resolution(from_step=2, image_size=(16, 8)),
        Resolution(from_step=3, image_size=(24, 16)),
    ]
    expected = [(8, 8), (8, 8), (16, 8), (24, 16), (24, 16)]
    through = take(train_data(patterns, resolutions=stages), 5)
    assert [tuple(batch.images.shape[2:]) for batch in through] == expected
    assert_same(take(train_data(patterns, resolutions=stages, num_workers=2), 3, 2), through[2:])
    # The same samples and crops as without a schedule.
    plain = take(train_data(patterns), 5)
    assert [batch.keys for batch in plain] == [batch.keys for batch in through]
    assert torch.equal(plain[1].images, through[1].images)


def test_sources_come_in_their_shares(tmp_path: Path, patterns: list[str]) -> None:
    other = {f"x{key}": parts for key, parts in sound_samples().items()}
    sources = [
        Source(shards=patterns[0], weight=1.0),
        Source(shards=write_shards(tmp_path, other)[0], weight=2.0),
    ]
    data = train_data(sources, num_lanes=2)
    batches = take(data, 10)
    for batch in batches:
        assert sum(key.startswith("x") for key in batch.keys) == BATCH * 2 / 3
    of_second = [key for batch in batches for key in batch.keys if key.startswith("x")]
    assert len(of_second) == 80
    assert len(set(of_second[:56])) == 56
    assert len(set(of_second[:64])) == NUM_SAMPLES
    parts = [train_data(sources, num_lanes=2, dp_rank=rank, dp_size=3) for rank in range(3)]
    for step, whole in enumerate(batches[:4]):
        keys = [key for part in parts for key in take(part, 1, step)[0].keys]
        assert keys == whole.keys


def test_bad_arguments_are_named(patterns: list[str]) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size \(12\) must be .* size \(5\)"):
        train_data(patterns, dp_size=5)
    with pytest.raises(ValueError, match=r"data\.train \(/none/x\.tar\) matches no file"):
        train_data(["/none/x.tar"])
    assert train_data(patterns).order.num_samples == 60

"""Training batches: bit-identical for every layout and start."""

import itertools
import multiprocessing
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from ds_linclip.config import (
    Resolution,
    Source,
)
from ds_linclip.data import Batch
from helpers.training_shards import (
    BATCH,
    NUM_SAMPLES,
    NUM_SHARDS,
    assert_same,
    sound_samples,
    take,
    train_data,
    write_shards,
)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), sound_samples())


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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_bit_identical(patterns: list[str], num_workers: int) -> None:
    through = take(train_data(patterns), 9)
    for start in (3, 7):  # in the middle of the first and of the second epoch
        resumed = train_data(patterns, num_workers=num_workers)
        assert_same(take(resumed, 9 - start, start), through[start:])


@pytest.mark.long
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


@pytest.mark.long
def test_fewer_shards_than_readers(tmp_path: Path) -> None:
    patterns = write_shards(tmp_path, sound_samples())
    one_shard = [patterns[0].replace("{00000..00003}", "00002")]
    whole = take(train_data(one_shard, num_lanes=8), 5)
    assert len({key for batch in whole for key in batch.keys}) == NUM_SAMPLES // NUM_SHARDS
    for rank in range(4):
        part = train_data(one_shard, num_lanes=8, num_workers=2, dp_rank=rank, dp_size=4)
        for step, batch in enumerate(take(part, 5)):
            assert batch.keys == whole[step].keys[3 * rank : 3 * rank + 3]


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
    """Sizes 20 and 10, taken as 15 each: no sample counts as bad, every read succeeds."""
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


def test_swapped_sources_have_another_identity(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name, sound_samples())[0] for name in "ab")
    one = train_data([Source(shards=first, weight=1), Source(shards=second, weight=1)])
    two = train_data([Source(shards=second, weight=1), Source(shards=first, weight=1)])
    assert one.order.fingerprint == two.order.fingerprint
    assert one.identity != two.identity


def test_identity_does_not_depend_on_the_folders_above(patterns, monkeypatch):
    """A run that was started with relative paths resumes with absolute ones."""
    folder = Path(patterns[0]).parent
    monkeypatch.chdir(folder.parent)
    relative = train_data([f"{folder.name}/{Path(patterns[0]).name}"])
    assert relative.identity == train_data(patterns).identity


def test_too_little_shared_memory_is_named(patterns: list[str]) -> None:
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

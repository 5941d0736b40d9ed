"""Order of samples: complete, pure, independent of the layout, cheap at full scale."""

import hashlib
import time

import numpy as np
import pytest

from ds_linclip.data.order import SampleOrder

SIZES = [7, 0, 13, 1, 5, 5, 11, 3, 9]
NUM_SAMPLES = sum(SIZES)


def make_order(seed: int = 3, num_lanes: int = 1, shuffle_shards: int = 2) -> SampleOrder:
    return SampleOrder(SIZES, seed=seed, num_lanes=num_lanes, shuffle_shards=shuffle_shards)


def ids_at(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    shards, indices = order.locate(positions)
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


@pytest.mark.parametrize("num_lanes", [1, 2, 4, 20])
@pytest.mark.parametrize("shuffle_shards", [1, 3, 100])
def test_every_sample_once_per_epoch(num_lanes: int, shuffle_shards: int) -> None:
    order = make_order(num_lanes=num_lanes, shuffle_shards=shuffle_shards)
    everything = {(shard, i) for shard, size in enumerate(SIZES) for i in range(size)}
    seen = []
    for epoch in range(3):
        positions = np.arange(epoch * NUM_SAMPLES, (epoch + 1) * NUM_SAMPLES)
        seen.append(ids_at(order, positions))
        assert len(seen[-1]) == NUM_SAMPLES
        assert set(seen[-1]) == everything
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_order_depends_on_seed_lanes_and_pool() -> None:
    positions = np.arange(NUM_SAMPLES)
    orders = [
        ids_at(order, positions)
        for order in (
            make_order(),
            make_order(seed=4),
            make_order(num_lanes=2),
            make_order(shuffle_shards=3),
        )
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_order_is_frozen() -> None:
    """A changed order would silently break the resumption of runs that are under way."""
    order = make_order(num_lanes=2)
    positions = np.concatenate(
        [
            order.step_positions(step, global_batch_size=18, dp_rank=1, dp_size=2)
            for step in range(3 * NUM_SAMPLES // 18)
        ]
    )
    found = [
        (p, *place) for p, place in zip(positions.tolist(), ids_at(order, positions), strict=True)
    ]
    assert found[:3] == [(1, 0, 5), (3, 8, 1), (5, 8, 5)]
    assert hashlib.sha256(repr(found).encode()).hexdigest() == (
        "48fb0d9bf7963d23d049ede6852506df2109c3bfe6da5498efe8aa306aab386f"
    )


def test_shards_and_samples_are_shuffled_anew_in_every_epoch() -> None:
    single_samples = SampleOrder([1] * 40, seed=0, num_lanes=1, shuffle_shards=1)
    single_shard = SampleOrder([40], seed=0, num_lanes=1, shuffle_shards=1)
    for order in (single_samples, single_shard):
        epochs = [tuple(ids_at(order, np.arange(40 * e, 40 * (e + 1)))) for e in range(3)]
        assert len(set(epochs)) == 3
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_seek_equals_run_through(num_lanes: int) -> None:
    through = ids_at(make_order(num_lanes=num_lanes), np.arange(4 * NUM_SAMPLES))
    rng = np.random.default_rng(0)
    scattered = rng.permutation(4 * NUM_SAMPLES)
    order = make_order(num_lanes=num_lanes)
    for start in range(0, len(scattered), 17):
        part = scattered[start : start + 17]
        assert ids_at(order, part) == [through[p] for p in part]


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_global_batches_do_not_depend_on_ranks(num_lanes: int) -> None:
    order = make_order(num_lanes=num_lanes)
    for step in range(10):  # more than three epochs; batches straddle their ends
        batches = []
        for dp_size in (1, 2, 4):
            parts = [
                order.step_positions(step, global_batch_size=20, dp_rank=rank, dp_size=dp_size)
                for rank in range(dp_size)
            ]
            assert {len(part) for part in parts} == {20 // dp_size}
            batches.append(np.concatenate(parts).tolist())
        assert batches[0] == batches[1] == batches[2]
        assert sorted(batches[0]) == list(range(step * 20, (step + 1) * 20))


def test_ranks_read_shards_of_their_own_lanes() -> None:
    sizes = [100] * 32
    order = SampleOrder(sizes, seed=0, num_lanes=4, shuffle_shards=2)
    shards_of_rank = []
    for rank in range(4):
        read: set[int] = set()
        for step in range(len(sizes) * 100 // 64):
            positions = order.step_positions(step, global_batch_size=64, dp_rank=rank, dp_size=4)
            read |= set(order.locate(positions)[0].tolist())
        shards_of_rank.append(read)
    assert all(len(read) == 8 for read in shards_of_rank)
    assert len(set.union(*shards_of_rank)) == 32


def test_pool_mixes_its_shards_and_no_others() -> None:
    order = SampleOrder([50] * 8, seed=0, num_lanes=1, shuffle_shards=4)
    shards = order.locate(np.arange(400))[0]
    assert len(set(shards[:200])) == 4
    assert set(shards[:200]).isdisjoint(shards[200:])
    assert len(set(shards[:20])) == 4


def test_laion_scale_is_quick() -> None:
    sizes = np.random.default_rng(0).integers(9_000, 9_990, 41_456)
    order = SampleOrder(sizes, seed=0, num_lanes=64, shuffle_shards=8)
    began = time.process_time()
    for step in (0, 1, 12_000, 12_001):
        positions = order.step_positions(step, global_batch_size=32_768, dp_rank=5, dp_size=64)
        order.locate(positions)
    assert time.process_time() - began < 2.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"train\.seed \(-1\) must not be negative"):
        make_order(seed=-1)
    with pytest.raises(ValueError, match=r"data\.train \(2 shards\) must hold at least one sample"):
        SampleOrder([0, 0], seed=0, num_lanes=1, shuffle_shards=1)

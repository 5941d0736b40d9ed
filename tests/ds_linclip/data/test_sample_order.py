"""Order of samples: complete, pure, independent of the layout, cheap at full scale."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data.sample_order import GroupSizes, SampleOrder

SIZES = [7, 0, 13, 1, 5, 5, 11, 3, 9]
NUM_SAMPLES = sum(SIZES)


def order_of(
    sizes: Sequence[int],
    *,
    seed: int = 0,
    num_lanes: int = 1,
    shuffle_shards: int = 1,
    with_replacement: bool = False,
) -> SampleOrder:
    """One group, all of it in every epoch."""
    return SampleOrder(
        [GroupSizes(sizes, int(sum(sizes)))],
        seed=seed,
        num_lanes=num_lanes,
        shuffle_shards=shuffle_shards,
        with_replacement=with_replacement,
    )


def make_order(seed: int = 3, num_lanes: int = 1, shuffle_shards: int = 2) -> SampleOrder:
    return order_of(SIZES, seed=seed, num_lanes=num_lanes, shuffle_shards=shuffle_shards)


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
    """A changed order would silently break the resumption of existing runs."""
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


def test_shards_and_samples_are_shuffled_again_in_every_epoch() -> None:
    single_samples = order_of([1] * 40)
    single_shard = order_of([40])
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
    order = order_of(sizes, num_lanes=4, shuffle_shards=2)
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
    order = order_of([50] * 8, shuffle_shards=4)
    shards = order.locate(np.arange(400))[0]
    assert len(set(shards[:200])) == 4
    assert set(shards[:200]).isdisjoint(shards[200:])
    assert len(set(shards[:20])) == 4


def group_of(shards: np.ndarray, groups: Sequence[GroupSizes]) -> np.ndarray:
    ends = np.cumsum([len(group.shard_sizes) for group in groups])
    return np.searchsorted(ends, shards, side="right")


def mixed(shares: Sequence[int], num_lanes: int = 1) -> tuple[SampleOrder, list[GroupSizes]]:
    """Groups of 40, 30 and 70 samples."""
    sizes = [[10] * 4, [15, 15], [7] * 10]
    groups = [GroupSizes(size, share) for size, share in zip(sizes, shares, strict=True)]
    return SampleOrder(groups, seed=1, num_lanes=num_lanes, shuffle_shards=2), groups


@pytest.mark.parametrize("num_lanes", [1, 3])
@pytest.mark.parametrize("shares", [(40, 30, 70), (20, 90, 30), (1, 138, 1)])
def test_mixture_is_exact_per_epoch_and_even_in_every_window(
    shares: tuple[int, int, int], num_lanes: int
) -> None:
    order, groups = mixed(shares, num_lanes)
    assert order.num_samples == sum(shares)
    of_position = group_of(order.locate(np.arange(3 * order.num_samples))[0], groups)
    for epoch in range(3):
        part = of_position[epoch * order.num_samples : (epoch + 1) * order.num_samples]
        assert np.bincount(part, minlength=3).tolist() == list(shares)
    for window in (10, 37, 100):
        counts = np.array(
            [
                np.bincount(of_position[start : start + window], minlength=3)
                for start in range(len(of_position) - window)
            ]
        )
        assert np.abs(counts - window * np.array(shares) / order.num_samples).max() < 3


def test_every_group_of_a_mixture_goes_through_all_its_samples() -> None:
    order, groups = mixed((20, 60, 70))  # half, twice and once
    places = ids_at(order, np.arange(2 * order.num_samples))
    times = Counter(places)
    for group, expected in enumerate((1, 4, 2)):
        of_group = {p: n for p, n in times.items() if group_of(np.array(p[0]), groups) == group}
        assert len(of_group) == sum(groups[group].shard_sizes)
        assert set(of_group.values()) == {expected}


def test_mixture_has_the_same_batches_for_every_number_of_ranks() -> None:
    order, groups = mixed((40, 30, 70), num_lanes=2)
    for step in range(20):
        whole = order.step_positions(step, global_batch_size=12, dp_rank=0, dp_size=1)
        parts = [
            order.step_positions(step, global_batch_size=12, dp_rank=rank, dp_size=3)
            for rank in range(3)
        ]
        assert np.concatenate(parts).tolist() == whole.tolist()
        assert sorted(whole.tolist()) == list(range(step * 12, (step + 1) * 12))
        of_position = group_of(order.locate(whole)[0], groups)
        assert (np.diff(of_position) >= 0).all()  # a rank reads few groups


def test_many_billion_samples_do_not_overflow() -> None:
    groups = [GroupSizes([10_000], 5_000_000_000), GroupSizes([10_000], 7_000_000_000)]
    order = SampleOrder(groups, seed=0, num_lanes=1, shuffle_shards=1)
    positions = np.arange(2 * order.num_samples - 1200, 2 * order.num_samples)
    counts = np.bincount(group_of(order.locate(positions)[0], groups))
    assert counts.tolist() == [500, 700]


def test_with_replacement_draws_shards_in_every_epoch_and_keeps_the_length_of_an_epoch() -> None:
    sizes = [4, 9, 0, 6, 11] * 20
    order = order_of(sizes, num_lanes=3, shuffle_shards=2, with_replacement=True)
    assert order.num_samples == sum(sizes)
    times = Counter(ids_at(order, np.arange(40 * order.num_samples)))
    assert len(times) == sum(sizes)  # in 40 passes each shard is drawn
    assert 3 < np.std([times[shard, 0] for shard, size in enumerate(sizes) if size]) < 10
    first = Counter(ids_at(order, np.arange(order.num_samples)))
    assert max(first.values()) > 1
    assert len(first) < sum(sizes)
    scattered = np.random.default_rng(0).permutation(2 * order.num_samples)[:200]
    through = ids_at(order, np.arange(2 * order.num_samples))
    assert ids_at(order, scattered) == [through[p] for p in scattered]


@pytest.mark.parametrize("num_lanes", [1, 3])
@pytest.mark.parametrize("shares", [(40, 30, 70), (1, 138, 1), (20, 90, 30)])
def test_following_pools_are_read_next_and_never_later(
    shares: tuple[int, int, int], num_lanes: int
) -> None:
    """Whatever a lane reads was announced while it read the pool before."""
    order, _ = mixed(shares, num_lanes)
    announced: dict[int, set[int]] = {}
    present: dict[int, set[int]] = {}
    for position in range(3 * order.num_samples):
        (lane, pool), *rest = order.pool_shards([position]).items()
        assert not rest
        assert int(order.locate([position])[0][0]) in pool
        if present.get(lane) != pool and lane in present:
            assert pool == announced[lane]
        present[lane] = pool
        (announced[lane],) = order.pool_shards([position], following=True).values()


@st.composite
def any_order(draw: st.DrawFn) -> tuple[SampleOrder, list[GroupSizes], bool]:
    """Groups of shards with their shares, and whether every sample comes equally often."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any))
        groups.append(GroupSizes(sizes, draw(st.integers(1, 2 * sum(sizes)))))
    with_replacement = draw(st.booleans())
    order = SampleOrder(
        groups,
        seed=draw(st.integers(0, 2**40)),
        num_lanes=draw(st.integers(1, 5)),
        shuffle_shards=draw(st.integers(1, 4)),
        with_replacement=with_replacement,
    )
    return order, groups, not with_replacement


@given(any_order(), st.integers(0, 100), st.sampled_from([1, 2, 3, 6]), st.randoms())
def test_any_order_is_complete_and_independent_of_layout_and_start(
    case: tuple[SampleOrder, list[GroupSizes], bool],
    start: int,
    dp_size: int,
    random: random.Random,
) -> None:
    order, groups, is_even = case
    length = 2 * order.num_samples
    through = ids_at(order, np.arange(length))
    sizes = [size for group in groups for size in group.shard_sizes]
    assert all(0 <= index < sizes[shard] for shard, index in through)
    in_group = group_of(np.array([shard for shard, _ in through]), groups)
    assert np.bincount(in_group, minlength=len(groups)).tolist() == [
        2 * group.samples_per_epoch for group in groups
    ]
    if is_even:  # the samples of a group come in turn
        for number, group in enumerate(groups):
            ids = [place for place, which in zip(through, in_group, strict=True) if which == number]
            num_samples = sum(group.shard_sizes)
            for first in range(0, len(ids), num_samples):
                one_pass = ids[first : first + num_samples]
                assert len(set(one_pass)) == len(one_pass)
    # Any position may be looked up at any time.
    positions = random.sample(range(length), min(length, 20))
    assert ids_at(order, np.array(positions)) == [through[position] for position in positions]
    # A global batch is the same on any number of ranks.
    whole = order.step_positions(start, global_batch_size=6, dp_rank=0, dp_size=1)
    parts = [
        order.step_positions(start, global_batch_size=6, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert sorted(whole.tolist()) == list(range(6 * start, 6 * start + 6))


def test_fingerprint_differs_between_orders() -> None:
    orders = [
        order_of(SIZES),
        order_of([*SIZES, 1]),
        order_of(SIZES, seed=1),
        order_of(SIZES, num_lanes=2),
        order_of(SIZES, shuffle_shards=2),
        order_of(SIZES, with_replacement=True),
        SampleOrder([GroupSizes(SIZES, 5)], seed=0, num_lanes=1, shuffle_shards=1),
    ]
    assert len({order.fingerprint for order in orders}) == len(orders)
    assert order_of(np.array(SIZES)).fingerprint == order_of(SIZES).fingerprint


def test_laion_scale_is_quick() -> None:
    sizes = np.random.default_rng(0).integers(9_000, 9_990, 41_456)
    order = order_of(sizes, num_lanes=64, shuffle_shards=8)
    began = time.process_time()
    for step in (0, 1, 12_000, 12_001):
        positions = order.step_positions(step, global_batch_size=32_768, dp_rank=5, dp_size=64)
        order.locate(positions)
    assert time.process_time() - began < 2.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"train\.seed \(-1\) must not be negative"):
        make_order(seed=-1)
    with pytest.raises(ValueError, match=r"data\.train \(2 shards\) must hold at least one sample"):
        order_of([0, 0])

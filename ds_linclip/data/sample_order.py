"""The order of training samples: a pure function of the seed, the shards and a few settings.

Samples form one endless stream of positions 0, 1, 2, ...; epoch e covers ``[e N, (e + 1) N)``. Any
position can be looked up at any time, so resuming at a step is a seek, and the order depends
neither on ranks nor on workers nor on the batch size.

The positions of an epoch are distributed over groups of shards in proportion to the samples of each
group per epoch, as evenly as integers allow. Every group is an endless stream of passes. One pass
contains every sample exactly once (or as many samples from shards drawn with replacement): the
shards are permuted and distributed over lanes. A lane takes ``shuffle_shards`` shards at a time as
a pool and permutes the pool's samples. Positions alternate over the lanes, skipping exhausted ones.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["GroupSizes", "SampleOrder"]

_Array = npt.NDArray[np.int64]

# First word of the spawn key of every random stream: no two purposes share one.
_SHARD_STREAM = 0
_POOL_STREAM = 1


class GroupSizes(NamedTuple):
    """Sizes of the shards of a group, which are shuffled together, and its positions per epoch."""

    shard_sizes: Sequence[int]
    samples_per_epoch: int


class SampleOrder:
    """The mapping from positions to samples.

    Args:
        groups: The shards, numbered consecutively over all groups.
        seed: Non-negative seed of all permutations.
        num_lanes: Independent streams that the shards of a group are distributed over.
        shuffle_shards: Shards of one lane whose samples are shuffled together.
        with_replacement: Draw the shards of a pass with replacement.

    Attributes:
        num_samples: Number of positions per epoch.
        num_lanes: Number of lanes in all groups.
        fingerprint: Hexadecimal digest of everything that determines the order.

    Raises:
        ValueError: for a negative seed, or when a group holds no sample.
    """

    def __init__(
        self,
        groups: Sequence[GroupSizes],
        *,
        seed: int,
        num_lanes: int,
        shuffle_shards: int,
        with_replacement: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"train.seed ({seed}) must not be negative")
        for group in groups:
            if sum(group.shard_sizes) == 0 or group.samples_per_epoch == 0:
                raise ValueError(
                    f"data.train ({len(group.shard_sizes)} shards) must hold at least one sample"
                )
        draw = _drawn if with_replacement else _permuted
        sizes = [np.asarray(group.shard_sizes, dtype=np.int64) for group in groups]
        self._groups = [
            _Group(each, (seed, number), num_lanes, shuffle_shards, draw)
            for number, each in enumerate(sizes)
        ]
        self._per_epoch = [group.samples_per_epoch for group in groups]
        self._first_shard = np.cumsum([0, *(len(group.shard_sizes) for group in groups)])
        self._lanes_per_group = num_lanes
        self.num_samples = sum(self._per_epoch)
        self.num_lanes = num_lanes * len(groups)
        facts = [
            *(seed, num_lanes, shuffle_shards, with_replacement),
            *zip(map(np.ndarray.tolist, sizes), self._per_epoch, strict=True),
        ]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def locate(self, positions: npt.ArrayLike) -> tuple[_Array, _Array]:
        """Find the samples at global positions.

        Args:
            positions: Non-negative positions [K], in any order.

        Returns:
            Shard number and index within the shard, each [K].
        """
        positions = np.asarray(positions, dtype=np.int64)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for group, rows, offsets in self._deal(positions):
            in_group, indices[rows] = self._groups[group].locate(offsets)
            shards[rows] = in_group + self._first_shard[group]
        return shards, indices

    def step_positions(
        self, step: int, *, global_batch_size: int, dp_rank: int, dp_size: int
    ) -> _Array:
        """Return the positions of one rank's part of one global batch.

        Step s covers positions ``[s G, (s + 1) G)``. They are sorted by lane and cut into
        ``dp_size`` equal parts, so the global batch is the same for every ``dp_size``, and a rank
        reads the shards of few lanes.

        Returns:
            Positions [G / dp_size].
        """
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        if self.num_lanes > 1:
            lanes = np.empty_like(positions)
            for group, rows, offsets in self._deal(positions):
                lanes[rows] = self._groups[group].lanes_at(offsets) + group * self._lanes_per_group
            positions = positions[np.argsort(lanes, kind="stable")]
        local = global_batch_size // dp_size
        return positions[dp_rank * local : (dp_rank + 1) * local]

    def pool_shards(
        self, positions: npt.ArrayLike, *, following: bool = False
    ) -> dict[int, set[int]]:
        """Return the shards of the pools that contain the samples at some positions.

        Args:
            positions: Non-negative positions [K].
            following: Whether to return the pools after these instead.

        Returns:
            Shard numbers by lane; lanes are numbered consecutively over all groups.
        """
        found: dict[int, set[int]] = {}
        for group, _, offsets in self._deal(np.asarray(positions, dtype=np.int64)):
            for lane, shards in self._groups[group].pools_at(offsets, following):
                pool = found.setdefault(group * self._lanes_per_group + lane, set())
                pool.update((shards + self._first_shard[group]).tolist())
        return found

    def _deal(self, positions: _Array) -> Iterator[tuple[int, npt.NDArray[np.intp], _Array]]:
        """Yield every group, the rows of ``positions`` in it, and their offsets in its stream.

        The first group takes its share of an epoch's positions evenly, the next one its share of
        the rest, and so on, so that in any window a group is within a few samples of its share.
        """
        rows = np.arange(len(positions))
        if len(self._groups) == 1:
            yield 0, rows, positions
            return
        epochs, left = np.divmod(positions, self.num_samples)
        if self.num_samples**2 >= 2**63 or positions.max(initial=0) >= 2**62:
            # The products below overflow 64 bits: use Python's integers, which are slower.
            epochs, left = epochs.astype(object), left.astype(object)
        total = self.num_samples
        for group, count in enumerate(self._per_epoch):
            before = left * count // total
            chosen = ((left + 1) * count // total > before).astype(bool)
            if chosen.any():
                offsets = epochs[chosen] * count + before[chosen]
                yield group, rows[chosen], offsets.astype(np.int64)
            rows, epochs, left = rows[~chosen], epochs[~chosen], (left - before)[~chosen]
            total -= count
            if not len(rows):
                return


@dataclass
class _Group:
    """The endless stream of one group, pass after pass over its shards."""

    sizes: _Array
    seed: tuple[int, int]
    num_lanes: int
    shuffle_shards: int
    draw: Callable[[_Array, tuple[int, int], int], tuple[_Array, _Array]]
    passes: dict[int, "_Pass"] = field(default_factory=dict)
    pools: dict[int, "_Pool"] = field(default_factory=dict)

    def locate(self, offsets: _Array) -> tuple[_Array, _Array]:
        shards, indices = np.empty_like(offsets), np.empty_like(offsets)
        for one_pass, lane, pool_number, rows, in_pool in self._by_pool(offsets):
            pool = self.pools.get(lane)
            if pool is None or (pool.pass_number, pool.number) != (one_pass.number, pool_number):
                pool = self.pools[lane] = _Pool(one_pass, lane, pool_number, self.seed)
            shards[rows], indices[rows] = pool.samples_at(in_pool)
        return shards, indices

    def lanes_at(self, offsets: _Array) -> _Array:
        lanes = np.empty_like(offsets)
        for one_pass, rows, in_pass in self._by_pass(offsets):
            lanes[rows] = one_pass.lanes_at(in_pass)[0]
        return lanes

    def pools_at(self, offsets: _Array, following: bool) -> Iterator[tuple[int, _Array]]:
        """Yield lane and shards of every pool with one of the samples, or of the pool after it."""
        for one_pass, lane, number, _, _ in self._by_pool(offsets):
            if not following:
                yield lane, one_pass.pool(lane, number)[0]
            elif number + 1 < len(one_pass.pool_starts[lane]):
                yield lane, one_pass.pool(lane, number + 1)[0]
            else:
                yield lane, self._pass(one_pass.number + 1).pool(lane, 0)[0]

    def _by_pass(self, offsets: _Array) -> Iterator[tuple["_Pass", npt.NDArray[np.intp], _Array]]:
        passes, in_pass = np.divmod(offsets, self.sizes.sum())
        for number in np.unique(passes):
            rows = np.flatnonzero(passes == number)
            yield self._pass(int(number)), rows, in_pass[rows]

    def _by_pool(
        self, offsets: _Array
    ) -> Iterator[tuple["_Pass", int, int, npt.NDArray[np.intp], _Array]]:
        for one_pass, rows, in_pass in self._by_pass(offsets):
            lanes, in_lane = one_pass.lanes_at(in_pass)
            for lane in np.unique(lanes):
                in_this = np.flatnonzero(lanes == lane)
                starts = one_pass.pool_starts[lane]
                pools = np.searchsorted(starts, in_lane[in_this], side="right") - 1
                for number in np.unique(pools):
                    chosen = in_this[pools == number]
                    in_pool = in_lane[chosen] - starts[number]
                    yield one_pass, int(lane), int(number), rows[chosen], in_pool

    def _pass(self, number: int) -> "_Pass":
        if number not in self.passes:
            if len(self.passes) >= 2:  # a batch spans two passes at most, save for tiny sets
                del self.passes[min(self.passes)]
            shards, sizes = self.draw(self.sizes, self.seed, number)
            self.passes[number] = _Pass(number, shards, sizes, self.num_lanes, self.shuffle_shards)
        return self.passes[number]


class _Pass:
    """One pass over a group: the lanes of its shards, and the alternation over the lanes."""

    def __init__(
        self, number: int, shards: _Array, sizes: _Array, num_lanes: int, shuffle_shards: int
    ) -> None:
        self.number = number
        self._shuffle_shards = shuffle_shards
        self._lanes = [
            (shards[lane::num_lanes], sizes[lane::num_lanes]) for lane in range(num_lanes)
        ]
        self.pool_starts = []
        lengths = np.empty(num_lanes, dtype=np.int64)
        for lane, (_, lane_sizes) in enumerate(self._lanes):
            ends = np.concatenate([[0], np.cumsum(lane_sizes)])
            lengths[lane] = ends[-1]
            self.pool_starts.append(ends[:-1:shuffle_shards])
        # Phase k lasts until the k-th shortest lane is exhausted; the remaining lanes alternate.
        levels = np.unique(lengths[lengths > 0])
        self._base = np.concatenate([[0], levels[:-1]])
        self._active = [np.flatnonzero(lengths >= level) for level in levels]
        self._num_active = np.array([len(active) for active in self._active])
        sizes_of_phases = (levels - self._base) * self._num_active
        self._starts = np.concatenate([[0], np.cumsum(sizes_of_phases)[:-1]])

    def lanes_at(self, offsets: _Array) -> tuple[_Array, _Array]:
        """Return lane and offset within the lane for offsets within the pass."""
        phases = np.searchsorted(self._starts, offsets, side="right") - 1
        turns, seats = np.divmod(offsets - self._starts[phases], self._num_active[phases])
        lanes = np.empty_like(offsets)
        for phase in np.unique(phases):
            rows = phases == phase
            lanes[rows] = self._active[phase][seats[rows]]
        return lanes, self._base[phases] + turns

    def pool(self, lane: int, number: int) -> tuple[_Array, _Array]:
        """Return the shards of one pool, and the number of samples of each in it."""
        shards, sizes = self._lanes[lane]
        chosen = slice(number * self._shuffle_shards, (number + 1) * self._shuffle_shards)
        return shards[chosen], sizes[chosen]


class _Pool:
    """The shuffled samples of a few shards of one lane."""

    def __init__(self, one_pass: _Pass, lane: int, number: int, seed: tuple[int, int]) -> None:
        self.pass_number, self.number = one_pass.number, number
        self._shards, sizes = one_pass.pool(lane, number)
        ends = np.cumsum(sizes)
        self._starts = np.concatenate([[0], ends[:-1]])
        bits = _bits(int(ends[-1]), seed, _POOL_STREAM, one_pass.number, lane, number)
        self._samples = np.argsort(bits, kind="stable")

    def samples_at(self, offsets: _Array) -> tuple[_Array, _Array]:
        samples = self._samples[offsets]
        which = np.searchsorted(self._starts, samples, side="right") - 1
        return self._shards[which], samples - self._starts[which]


def _permuted(sizes: _Array, seed: tuple[int, int], number: int) -> tuple[_Array, _Array]:
    """Return all shards in the order of one pass, and their numbers of samples."""
    shards = np.argsort(_bits(len(sizes), seed, _SHARD_STREAM, number), kind="stable")
    return shards, sizes[shards]


def _drawn(sizes: _Array, seed: tuple[int, int], number: int) -> tuple[_Array, _Array]:
    """Draw shards with replacement until a pass is full; the last shard is cut to fit."""
    total, draws = int(sizes.sum()), len(sizes)
    while True:
        bits = _bits(draws, seed, _SHARD_STREAM, number)
        shards = (bits % np.uint64(len(sizes))).astype(np.int64)
        ends = np.cumsum(sizes[shards])
        if ends[-1] >= total:
            break
        draws *= 2
    last = int(np.searchsorted(ends, total))
    taken = sizes[shards[: last + 1]].copy()
    taken[-1] -= ends[last] - total
    return shards[: last + 1], taken


def _bits(count: int, seed: tuple[int, int], *stream: int) -> npt.NDArray[np.uint64]:
    # Raw bits, not Generator's methods: numpy keeps the streams of bit generators and of
    # SeedSequence stable between versions, those of Generator's methods not (NEP 19).
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(count)

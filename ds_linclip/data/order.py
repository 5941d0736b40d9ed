"""The order of training samples: a pure function of the seed, the shards and two settings.

Samples form one endless stream of positions 0, 1, 2, ...; epoch e covers ``[e N, (e + 1) N)`` and
holds every sample exactly once. Any position can be looked up at any time, so going on from a step
is a seek, and neither ranks nor workers nor the batch size have any influence on the order.

Per epoch the shards are permuted and dealt to lanes. A lane takes ``shuffle_shards`` shards at a
time as a pool and permutes the pool's samples. Positions alternate over the lanes; a lane that is
exhausted drops out of the alternation.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["SampleOrder"]

_Array = npt.NDArray[np.int64]

# First word of the spawn key of every random stream: no two purposes share one.
_SHARD_STREAM = 0
_POOL_STREAM = 1


class SampleOrder:
    """Which sample stands at which position.

    Args:
        shard_sizes: Samples in each shard.
        seed: Not negative.
        num_lanes: Independent streams the shards are dealt to.
        shuffle_shards: Shards of one lane whose samples are shuffled together.

    Raises:
        ValueError: for a negative seed, or when the shards hold no sample.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int, num_lanes: int, shuffle_shards: int
    ) -> None:
        if seed < 0:
            raise ValueError(f"train.seed ({seed}) must not be negative")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._seed = seed
        self._num_lanes = num_lanes
        self._shuffle_shards = shuffle_shards
        self.num_samples = int(self._sizes.sum())
        if self.num_samples == 0:
            raise ValueError(
                f"data.train ({len(self._sizes)} shards) must hold at least one sample"
            )
        self._epochs: dict[int, _Epoch] = {}
        self._pools: dict[int, _Pool] = {}

    def locate(self, positions: npt.ArrayLike) -> tuple[_Array, _Array]:
        """Find the samples at global positions.

        Args:
            positions: Any shape [K], not negative, in any order.

        Returns:
            Shard number and index within the shard, each [K].
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // self.num_samples
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == number)
            epoch = self._epoch(int(number))
            lanes, offsets = epoch.lanes_at(positions[in_epoch] - number * self.num_samples)
            for lane in np.unique(lanes):
                in_lane = np.flatnonzero(lanes == lane)
                rows = in_epoch[in_lane]
                shards[rows], indices[rows] = self._in_lane(epoch, int(lane), offsets[in_lane])
        return shards, indices

    def step_positions(
        self, step: int, *, global_batch_size: int, dp_rank: int, dp_size: int
    ) -> _Array:
        """Positions of one rank's part of one global batch.

        Step s covers positions ``[s G, (s + 1) G)``. They are ordered by lane and cut into
        ``dp_size`` equal pieces: the pieces in rank order are the same global batch for every
        ``dp_size``, and a rank reads the shards of few lanes.

        Returns:
            Positions [G / dp_size].
        """
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        if self._num_lanes > 1:
            epochs = positions // self.num_samples
            lanes = np.empty_like(positions)
            for number in np.unique(epochs):
                rows = epochs == number
                start = number * self.num_samples
                lanes[rows] = self._epoch(int(number)).lanes_at(positions[rows] - start)[0]
            positions = positions[np.argsort(lanes, kind="stable")]
        local = global_batch_size // dp_size
        return positions[dp_rank * local : (dp_rank + 1) * local]

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            if len(self._epochs) >= 2:  # a batch spans two epochs at most, save for tiny sets
                del self._epochs[min(self._epochs)]
            self._epochs[number] = _Epoch(
                number, self._sizes, self._seed, self._num_lanes, self._shuffle_shards
            )
        return self._epochs[number]

    def _in_lane(self, epoch: "_Epoch", lane: int, offsets: _Array) -> tuple[_Array, _Array]:
        starts = epoch.pool_starts[lane]
        pools = np.searchsorted(starts, offsets, side="right") - 1
        shards, indices = np.empty_like(offsets), np.empty_like(offsets)
        for number in np.unique(pools):
            rows = pools == number
            pool = self._pools.get(lane)
            if pool is None or (pool.epoch, pool.number) != (epoch.number, number):
                pool = _Pool(epoch, lane, int(number), self._sizes, self._seed)
                self._pools[lane] = pool
            shards[rows], indices[rows] = pool.samples_at(offsets[rows] - starts[number])
        return shards, indices


class _Epoch:
    """One epoch's deal of shards to lanes and the alternation over them."""

    def __init__(
        self, number: int, sizes: _Array, seed: int, num_lanes: int, shuffle_shards: int
    ) -> None:
        self.number = number
        self.shuffle_shards = shuffle_shards
        shards = _permutation(len(sizes), seed, _SHARD_STREAM, number)
        self.lane_shards = [shards[lane::num_lanes] for lane in range(num_lanes)]
        self.pool_starts = []
        lengths = np.empty(num_lanes, dtype=np.int64)
        for lane, dealt in enumerate(self.lane_shards):
            ends = np.concatenate([[0], np.cumsum(sizes[dealt])])
            lengths[lane] = ends[-1]
            self.pool_starts.append(ends[:-1:shuffle_shards])
        # Phase k lasts until the k-th shortest lane is exhausted; its active lanes take turns.
        levels = np.unique(lengths[lengths > 0])
        self._base = np.concatenate([[0], levels[:-1]])
        self._active = [np.flatnonzero(lengths >= level) for level in levels]
        self._num_active = np.array([len(active) for active in self._active])
        sizes_of_phases = (levels - self._base) * self._num_active
        self._starts = np.concatenate([[0], np.cumsum(sizes_of_phases)[:-1]])

    def lanes_at(self, positions: _Array) -> tuple[_Array, _Array]:
        """Lane and offset within the lane of positions within the epoch."""
        phases = np.searchsorted(self._starts, positions, side="right") - 1
        turns, seats = np.divmod(positions - self._starts[phases], self._num_active[phases])
        lanes = np.empty_like(positions)
        for phase in np.unique(phases):
            rows = phases == phase
            lanes[rows] = self._active[phase][seats[rows]]
        return lanes, self._base[phases] + turns


class _Pool:
    """The shuffled samples of a few shards of one lane."""

    def __init__(self, epoch: _Epoch, lane: int, number: int, sizes: _Array, seed: int) -> None:
        self.epoch, self.number = epoch.number, number
        first = number * epoch.shuffle_shards
        self._shards = epoch.lane_shards[lane][first : first + epoch.shuffle_shards]
        ends = np.cumsum(sizes[self._shards])
        self._starts = np.concatenate([[0], ends[:-1]])
        self._samples = _permutation(int(ends[-1]), seed, _POOL_STREAM, epoch.number, lane, number)

    def samples_at(self, offsets: _Array) -> tuple[_Array, _Array]:
        samples = self._samples[offsets]
        which = np.searchsorted(self._starts, samples, side="right") - 1
        return self._shards[which], samples - self._starts[which]


def _permutation(size: int, seed: int, *stream: int) -> _Array:
    # Sorting raw bits, not Generator.permutation: numpy keeps the streams of bit generators and of
    # SeedSequence stable between versions, those of Generator's methods not (NEP 19).
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(size)
    return np.argsort(bits, kind="stable")

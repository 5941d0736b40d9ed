"""Finds the rank that all others wait for."""

import logging
import socket
import statistics
import time
from collections.abc import Sequence

import torch

from ds_linclip.parallel.mesh import Mesh

__all__ = ["OwnTimes"]

logger = logging.getLogger(__name__)

#: A lag of less than this share of a step is not worth a warning, however slow the rank.
_NOTABLE_SHARE = 0.1


class OwnTimes:
    """Each rank's own time per step: what it spends before it first waits for all others.

    That is its wait for data and the forward of its part of the batch, up to the exchange of
    features. Afterwards ranks wait for each other in every collective, and all look equally slow.
    On a GPU two events per step mark the forward, and are read when somebody asks; nothing waits
    for the device.

    What blurs it: ranks that share their samples wait for each other within the forward (layers of
    tensor- and context-parallel peers, weights under ZeRO-3, the stages of a pipeline), so that a
    slow one makes its peers look slow too, and with ``parallel.pp`` the whole pipeline is measured.
    A rank that is slow only in its backward or in the optimizer is not found.

    Args:
        mesh: The ranks to compare.
        bound: Own time over that of the median rank from which a rank is named; 0: never.
    """

    def __init__(self, mesh: Mesh, bound: float) -> None:
        self._mesh = mesh
        self._bound = bound
        self._on_gpu = mesh.device.type == "cuda"
        self._suspect: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far."""
        self._waits: list[float] = []
        self._marks: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._began: float | torch.cuda.Event | None = None

    def data_ready(self, waited: float) -> None:
        """Begin the forward of a step, after a wait of some seconds."""
        self._waits.append(waited)
        self._began = self._mark()

    def features_ready(self) -> None:
        """The forward is done; the others' features are needed next."""
        if self._began is not None:
            self._marks.append((self._began, self._mark()))
            self._began = None

    def read(self, seconds_per_step: float) -> dict[str, float]:
        """Which rank is slowest since the restart, how much slower than the median rank, and the
        mean over the largest time.

        A rank's time is the median of its steps, so that a compilation or a single late batch does
        not count. With an even number of ranks the median rank is the lower of the middle two. Rank
        0 warns when the same rank exceeds the bound for the second time running, and its lag is a
        notable part of a step. Called by all ranks together, after the device has done the last
        step.

        Args:
            seconds_per_step: Wall time.
        """
        mine = (self._own_time(), socket.gethostname())
        times, hosts = zip(*self._mesh.gather_all(mine), strict=True)
        rank, ratio = slowest(times)
        lag = times[rank] - times[rank] / ratio
        is_slow = 0 < self._bound < ratio and lag > _NOTABLE_SHARE * seconds_per_step
        was_slow, self._suspect = self._suspect == rank, rank if is_slow else None
        if self._mesh.rank == 0 and is_slow and was_slow:
            logger.warning(
                "rank %d (host %s) is slow: %.3f s of its own per step, %.1f times the median "
                "rank's; all ranks wait for it",
                *(rank, hosts[rank], times[rank], ratio),
            )
        return {
            "perf/slowest_rank": rank,
            "perf/slowest_rank_ratio": ratio,
            "perf/load_balance": statistics.fmean(times) / times[rank] if times[rank] > 0 else 1.0,
        }

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_time(self) -> float:
        """Seconds of the median step; 0 without a step."""
        steps = zip(self._waits, self._marks, strict=False)
        seconds = [waited + _seconds(*marks) for waited, marks in steps]
        return statistics.median(seconds) if seconds else 0.0


def slowest(times: Sequence[float]) -> tuple[int, float]:
    """The slowest rank and its time over that of the median rank (1 when that took no time)."""
    rank = max(range(len(times)), key=lambda each: times[each])
    median = statistics.median_low(times)
    return rank, times[rank] / median if median > 0 else 1.0


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1e3
    assert not isinstance(end, torch.cuda.Event)
    return end - begin

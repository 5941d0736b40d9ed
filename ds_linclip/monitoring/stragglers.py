"""Detection of the rank that all others wait for."""

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ds_linclip.parallel.mesh import Mesh

__all__ = ["StragglerDetector"]

logger = logging.getLogger(__name__)

#: A lag of less than this share of a step causes no warning, however slow the rank.
_NOTABLE_SHARE = 0.1
#: A point in time: seconds on a CPU, a torch.cuda.Event on a GPU.
_Mark = Any


class StragglerDetector:
    """Compares the ranks' own times per step: what each spends before it first waits for others.

    A rank's own time is its wait for data and the forward of its part of the batch, up to the
    gathering of features. Afterwards ranks wait for each other in every collective, and all seem
    equally slow. On a GPU two events per step mark the forward; they are read only by :meth:`read`,
    so that no step waits for the device.

    Limits: ranks that share their samples wait for each other within the forward (layers of tensor-
    and context-parallel peers, weights under ZeRO-3, the stages of a pipeline), so that a slow rank
    makes its peers seem slow too, and with ``parallel.pp`` the whole pipeline is measured. A rank
    that is slow only in its backward or in the optimizer is not detected.

    ``bound`` is the ratio of a rank's own time to the median rank's above which to warn; 0: never.
    """

    def __init__(self, mesh: Mesh, bound: float) -> None:
        self._mesh = mesh
        self._bound = bound
        self._on_gpu = mesh.device.type == "cuda"
        self._suspect: int | None = None
        self.restart()

    def restart(self) -> None:
        """Discard the steps so far."""
        self._waits: list[float] = []
        self._marks: list[tuple[_Mark, _Mark]] = []
        self._started: _Mark | None = None

    def data_ready(self, waited: float) -> None:
        """Mark the start of a step's forward, after a wait for data of so many seconds."""
        self._waits.append(waited)
        self._started = self._mark()

    def features_ready(self) -> None:
        """Mark the end of the forward; other ranks' features are needed next."""
        if self._started is not None:
            self._marks.append((self._started, self._mark()))
            self._started = None

    def read(self, seconds_per_step: float) -> dict[str, float]:
        """Return the slowest rank since the restart and its ratio to the median, by tag.

        A rank's time is the median of its steps, so that a compilation or a single late batch does
        not count. With an even number of ranks the median rank is the lower of the middle two. Rank
        0 warns when the same rank exceeds the bound twice in a row and its lag is a notable part of
        a step. All ranks call this together, after the device has finished the last step.
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

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_time(self) -> float:
        """Return the seconds of the median step; 0 without a step."""
        steps = zip(self._waits, self._marks, strict=False)
        seconds = [waited + self._between(*marks) for waited, marks in steps]
        return statistics.median(seconds) if seconds else 0.0

    def _between(self, start: _Mark, end: _Mark) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


def slowest(times: Sequence[float]) -> tuple[int, float]:
    """Return the slowest rank and the ratio of its time to the median rank's (1 if that is 0)."""
    rank = max(range(len(times)), key=lambda each: times[each])
    median = statistics.median_low(times)
    return rank, times[rank] / median if median > 0 else 1.0

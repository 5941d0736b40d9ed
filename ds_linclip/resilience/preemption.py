"""Requests that reach one rank and that all ranks must follow after the same step.

They come from signals, from the clock, and from a save that has failed.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from types import FrameType

import torch
import torch.distributed as dist

from ds_linclip.parallel.mesh import Mesh

__all__ = ["Preempted", "PreemptionSignals", "RequestReducer", "RunRequests"]


class Preempted(Exception):
    """All ranks were requested to leave, and have saved their last step."""


@dataclass(frozen=True)
class RunRequests:
    """Actions to take after a step."""

    save: bool = False  #: Save a checkpoint.
    leave: bool = False  #: Save a checkpoint and end.
    has_failed: bool = False  #: End, because an earlier save has failed.


class RequestReducer:
    """Combines the requests of all ranks, so that all of them act after the same step.

    The result of a step's reduction is available one step later: it runs in the background, on
    connections of its own, and no step waits for it. All ranks create the reducer together.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = mesh.new_cpu_group()
        self._flags = torch.zeros(len(astuple(RunRequests())), dtype=torch.uint8)
        self._pending: dist.Work | None = None

    def reduce(self, requests: RunRequests) -> RunRequests:
        """Submit this rank's requests; return what any rank submitted one step ago.

        All ranks call this after every step. In a world of one, ``requests`` itself is returned.
        """
        if self._group is None:
            return requests
        self.close()
        reduced = RunRequests(*self._flags.bool().tolist())
        self._flags = torch.tensor(astuple(requests), dtype=torch.uint8)
        self._pending = dist.all_reduce(
            self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return reduced

    def close(self) -> None:
        """Wait for the reduction that is under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


class PreemptionSignals:
    """Records SIGTERM and Ctrl-C (save and leave), and SIGUSR1 (save and continue).

    A second Ctrl-C raises KeyboardInterrupt, as in any program.
    """

    def __init__(self) -> None:
        self._save = self._leave = False

    @contextmanager
    def caught(self) -> Iterator["PreemptionSignals"]:
        """Catch the signals while in the context; must be entered by the main thread."""
        actions = {
            signal.SIGTERM: self._on_leave,
            signal.SIGINT: self._on_interrupt,
            signal.SIGUSR1: self._on_save,
        }
        before = {number: signal.signal(number, action) for number, action in actions.items()}
        try:
            yield self
        finally:
            for number, action in before.items():
                signal.signal(number, action)
            if self._leave:  # another SIGTERM must not cut the end of the run short
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def take(self) -> tuple[bool, bool]:
        """Return whether to save and whether to leave; a request to save is returned once."""
        taken, self._save = (self._save, self._leave), False
        return taken

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_leave(self, number: int, frame: FrameType | None) -> None:
        # More than one changes nothing: launcher and scheduler may both signal every process.
        self._leave = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._leave = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

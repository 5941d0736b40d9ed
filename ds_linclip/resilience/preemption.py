"""What one rank is asked and all must do at the same step: signals, the clock, a failed save."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from types import FrameType

import torch
import torch.distributed as dist

from ds_linclip.parallel.mesh import Mesh

__all__ = ["Exchange", "Preempted", "Requests", "Signals"]

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """All ranks were asked to leave, and have saved the step that they stand at."""


@dataclass(frozen=True)
class Requests:
    """What to do after a step."""

    #: Save a checkpoint.
    save: bool = False
    #: Save a checkpoint and end.
    leave: bool = False
    #: A save that was begun earlier has failed.
    has_failed: bool = False


class Exchange:
    """Lets all ranks hear of each other's requests after the same step.

    Every rank brings its own to every step. What comes back is what any rank brought to the step
    before: the exchange runs beside the step, on connections of its own, and nothing waits for it.

    Args:
        mesh: The ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = dist.new_group(backend="gloo") if mesh.world_size > 1 else None
        self._flags = torch.zeros(len(astuple(Requests())), dtype=torch.uint8)
        self._pending: dist.Work | None = None

    def __call__(self, mine: Requests) -> Requests:
        """What any rank asked for one step ago; in a world of one, now."""
        if self._pending is not None:
            self._pending.wait()
        heard = Requests(*self._flags.bool().tolist())
        self._flags = torch.tensor(astuple(mine), dtype=torch.uint8)
        if self._group is None:
            return mine
        self._pending = dist.all_reduce(
            self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return heard

    def close(self) -> None:
        """Wait for what is under way; every rank has come to the same step."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


class Signals:
    """Notes SIGTERM (save and leave) and SIGUSR1 (save and go on) until they are taken."""

    def __init__(self) -> None:
        self._save = self._leave = False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Catch the signals for as long as the context; of the main thread only."""
        actions = {signal.SIGTERM: self._on_leave, signal.SIGUSR1: self._on_save}
        before = {number: signal.signal(number, action) for number, action in actions.items()}
        try:
            yield self
        finally:
            for number, action in before.items():
                signal.signal(number, action)
            if self._leave:  # under way: once more must not cut it short
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def take(self) -> tuple[bool, bool]:
        """Whether to save, and whether to leave, has been asked since this was last called."""
        taken, self._save = (self._save, self._leave), False
        return taken

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_leave(self, number: int, frame: FrameType | None) -> None:
        # Once more changes nothing: launcher and scheduler may both send it to every process.
        self._leave = True

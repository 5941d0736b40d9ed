"""What the training loop is doing, for others to look at: a step and a phase."""

import time
from typing import NamedTuple

__all__ = ["Place", "Progress"]


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        entered: Phases entered since the start. All ranks enter the same ones in the same order, so
            this tells who is behind.
        step: The optimizer step that is being made, or was last made.
        phase: In words; empty before the first.
        since: Unix time of entering it.
    """

    entered: int
    step: int
    phase: str
    since: float


class Progress:
    """Written by the training loop, read by other threads at any time.

    Entering a phase is one assignment: it can stand anywhere in the loop.
    """

    def __init__(self) -> None:
        self._place = Place(0, 0, "", time.time())

    @property
    def place(self) -> Place:
        """The phase entered last."""
        return self._place

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase.

        Args:
            phase: In words such as "saving" or "waiting for data".
            step: The optimizer step it belongs to; None: that of the phase before.
        """
        before = self._place
        step = before.step if step is None else step
        self._place = Place(before.entered + 1, step, phase, time.time())

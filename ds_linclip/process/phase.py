"""The phase of the training loop, for the watchdog and the metrics endpoint."""

import time
from typing import NamedTuple

__all__ = ["Phase", "PhaseTracker"]


class Phase(NamedTuple):
    """A phase of the training loop on one rank.

    Attributes:
        entered: The number of phases entered since the start. All ranks enter the same ones in the
            same order, so this tells which rank is behind.
        step: The optimizer step that is being made, or was made last.
        phase: The name, such as "saving"; empty before the first phase.
        since: Unix time at which it was entered.
    """

    entered: int
    step: int
    phase: str
    since: float


class PhaseTracker:
    """The current phase, written by the training loop and read by other threads at any time.

    Entering a phase is one assignment, cheap enough for any place in the loop.
    """

    def __init__(self) -> None:
        self.current = Phase(0, 0, "", time.time())

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase.

        Args:
            phase: The name, such as "saving" or "waiting for data".
            step: The optimizer step it belongs to; None: that of the phase before.
        """
        step = self.current.step if step is None else step
        self.current = Phase(self.current.entered + 1, step, phase, time.time())

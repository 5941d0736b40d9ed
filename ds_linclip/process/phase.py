"""The phase of the training loop, for the watchdog and the metrics endpoint."""

import time
from typing import NamedTuple

__all__ = ["Phase", "PhaseTracker"]


class Phase(NamedTuple):
    """A phase of the training loop on one rank."""

    #: The number of phases entered since the start. All ranks enter the same ones in the same
    #: order, so this tells which rank is behind.
    entered: int
    step: int  #: The optimizer step that is being made, or was made last.
    phase: str  #: The name, such as "saving"; empty before the first phase.
    since: float  #: Unix time at which it was entered.


class PhaseTracker:
    """The current phase, written by the training loop and read by other threads at any time.

    Entering a phase is one assignment, cheap enough for any place in the loop.
    """

    def __init__(self) -> None:
        self.current = Phase(0, 0, "", time.time())

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase of an optimizer step, by default that of the phase before."""
        step = self.current.step if step is None else step
        self.current = Phase(self.current.entered + 1, step, phase, time.time())

"""Settings of the optimizer, and the schedules of its learning rate: a dataclass per kind.

A schedule is a pure function of the step, so a resumed run continues with the same numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "ConstantSchedule",
    "CooldownSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "OptimConfig",
    "Schedule",
]


class _Schedule:
    """What all kinds have in common; the warm-up comes before them."""

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction of the peak learning rate at a step after the warm-up.

        Args:
            step: The step, counted from 0 at the end of the warm-up.
            steps: Number of steps of the run after the warm-up.
        """
        raise NotImplementedError

    def problems(self, steps: int) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken, in a
        run of so many steps after the warm-up."""
        yield from ()


@dataclass(kw_only=True, frozen=True)
class _WithFloor(_Schedule):
    #: Fraction of the peak learning rate at the end of the run.
    floor: float = 0.0

    def problems(self, steps: int) -> Iterator[tuple[str, str]]:
        if not 0 <= self.floor <= 1:
            yield "floor", "be in [0, 1], a fraction of the peak learning rate"


@dataclass(kw_only=True, frozen=True)
class CosineSchedule(_WithFloor):
    """Half a cosine from the peak to the floor (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"

    def factor(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * (step / steps)))


@dataclass(kw_only=True, frozen=True)
class LinearSchedule(_WithFloor):
    """A straight line from the peak to the floor."""

    kind: Literal["linear"] = "linear"

    def factor(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 - step / steps)


@dataclass(kw_only=True, frozen=True)
class ConstantSchedule(_Schedule):
    """The peak learning rate to the end."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(kw_only=True, frozen=True)
class CooldownSchedule(_WithFloor):
    """The peak learning rate, then a cooldown to the floor (warm-up-stable-decay, WSD, arXiv
    2404.06395; open_clip's const-cooldown).

    The learning rate before the cooldown does not depend on the length of the run, so one long run
    with `constant` can be cooled down from any of its checkpoints (`checkpoint.branch_from`).
    """

    kind: Literal["cooldown"] = "cooldown"
    #: Number of steps of the cooldown, the last ones of the run; required.
    cooldown_steps: int = 0
    #: The cooldown falls as (1 - fraction of it)^power; 1: a straight line.
    power: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        done = step - (steps - self.cooldown_steps)
        if done < 0:
            return 1.0
        return self.floor + (1 - self.floor) * (1 - done / self.cooldown_steps) ** self.power

    def problems(self, steps: int) -> Iterator[tuple[str, str]]:
        yield from super().problems(steps)
        if not 0 < self.cooldown_steps <= steps:
            yield (
                "cooldown_steps",
                f"be in 1..{steps}, the steps of the run after optim.warmup_steps",
            )
        if not 0 < self.power < math.inf:
            yield "power", "be greater than 0 and finite"


#: The learning rate after the warm-up.
Schedule = CosineSchedule | LinearSchedule | ConstantSchedule | CooldownSchedule


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, with a linear warm-up and a schedule of the learning rate.

    The defaults are open_clip's for a ViT.
    """

    #: `adamw`: torch's. `lion` (arXiv 2302.06675): try a tenth of AdamW's learning rate and ten
    #: times its weight decay; it has no `eps`. `lamb` (arXiv 1904.00962): one trust ratio per
    #: matrix, for very large batches.
    kind: Literal["adamw", "lion", "lamb"] = "adamw"
    #: Peak learning rate, at the end of the warm-up.
    lr: float = 5e-4
    #: Decay of the first moment.
    beta1: float = 0.9
    #: Decay of the second moment, of `lion` that of the momentum; null: 0.98, of `lion` 0.99.
    beta2: float | None = None
    #: Added to the root of the second moment.
    eps: float = 1e-6
    #: Decoupled weight decay, for matrices only: not for gains, biases and the logit scale.
    weight_decay: float = 0.2
    #: Steps of the linear warm-up.
    warmup_steps: int = 10_000
    #: Learning rate after the warm-up; `kind` chooses one of the kinds below.
    schedule: Schedule = field(default_factory=CosineSchedule)
    #: Maximum gradient norm over all parameters; 0: no clipping.
    clip_grad_norm: float = 1.0
    #: Decay per step, after its own warm-up, of a running average of the weights (EMA), which
    #: evaluation then uses; 0: no average. Costs 4 bytes per parameter, shared by the data-parallel
    #: ranks.
    ema_decay: float = 0.0

    @property
    def betas(self) -> tuple[float, float]:
        """The decays of both moments, that of the second by the optimizer unless it is set."""
        default = 0.99 if self.kind == "lion" else 0.98
        return self.beta1, default if self.beta2 is None else self.beta2

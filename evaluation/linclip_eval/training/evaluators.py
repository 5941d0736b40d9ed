"""All that a run scores while it trains."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_linclip.config import Config
from ds_linclip.process.phase import PhaseTracker
from linclip_eval.protocols import Better
from linclip_eval.training.validation import ValidationEvaluator
from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator

__all__ = ["Evaluators"]


class _Part(Protocol):
    @property
    def metrics(self) -> Mapping[str, Better]: ...
    def rehearse(self, model: Any, phases: PhaseTracker) -> None: ...
    def __call__(self, model: Any, writer: Any, step: int) -> Mapping[str, float]: ...


class Evaluators:
    """Several evaluators as one; they score in turn."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    @classmethod
    def from_config(
        cls, config: Config, *, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> "Evaluators | None":
        """Return the evaluators that ``config.eval`` describes; None when it describes none.

        Args:
            device: The device of the model.
            group: The data-parallel ranks, which divide the work; None: this process alone.

        Raises:
            ValueError: when held-out data cannot be opened.
        """
        parts = list(_parts(config, device=device, group=group))
        return cls(parts) if parts else None

    @property
    def metrics(self) -> Mapping[str, Better]:
        """The tags that a call returns, and which end of each is better."""
        return {tag: better for part in self._parts for tag, better in part.metrics.items()}

    def rehearse(self, model: Any, phases: PhaseTracker) -> None:
        """Try before the first step what the later calls need; all ranks together."""
        for part in self._parts:
            part.rehearse(model, phases)

    def __call__(self, model: Any, writer: Any, step: int) -> Mapping[str, float]:
        """Return all scores of a model in eval mode, by their tags; all ranks together."""
        values: dict[str, float] = {}
        for part in self._parts:
            values |= part(model, writer, step)
        return values


def _parts(
    config: Config, *, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[_Part]:
    if config.eval.data is not None:
        yield HeldOutEvaluator.from_config(config, device=device, group=group)
    for held_out in config.eval.sets:
        yield HeldOutEvaluator.from_config(config, device=device, group=group, held_out=held_out)
    if config.eval.validation.shards is not None:
        yield ValidationEvaluator.from_config(config, device=device, group=group)

"""Evaluators of training that are functions."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["Scores"]


class Scores:
    """Calls a function with model, writer and step at every evaluation; rehearses nothing."""

    def __init__(
        self,
        function: Callable[[Any, Any, int], Mapping[str, float]],
        metrics: Mapping[str, Literal["max", "min"]] | None = None,
    ) -> None:
        self._function = function
        self.metrics = metrics or {}

    def rehearse(self, model: Any, phases: Any) -> None:
        pass

    def __call__(self, model: Any, writer: Any, step: int) -> Mapping[str, float]:
        return self._function(model, writer, step)

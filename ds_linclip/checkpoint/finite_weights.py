"""The check that weights are numbers: neither NaN nor infinite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["FiniteCheck", "check_finite"]

#: Tensors that a message names.
_NUM_NAMED = 3


class FiniteCheck:
    """Sees named tensors one after another, and then says which of them hold NaN or infinity."""

    def __init__(self) -> None:
        self._num_seen, self._bad = 0, list[str]()

    def see(self, name: str, tensor: Tensor) -> None:
        """Look at one tensor, of any dtype and device, once."""
        self._num_seen += 1
        if problem := _problem_of(tensor):
            self._bad.append(f"{name} ({problem})")

    def conclude(self) -> None:
        """Raise ValueError if a tensor was not finite, naming the first and how many there are."""
        if not self._bad:
            return
        rest = f" and {len(self._bad) - _NUM_NAMED} more" if len(self._bad) > _NUM_NAMED else ""
        raise ValueError(
            f"weights must be finite, but {len(self._bad)} of {self._num_seen} tensors hold NaN or "
            f"infinity: {', '.join(self._bad[:_NUM_NAMED])}{rest}"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that named tensors hold neither NaN nor infinity, in one pass over their values.

    Raises:
        ValueError: naming the first that do, and how many there are.
    """
    check = FiniteCheck()
    for name, tensor in tensors:
        check.see(name, tensor)
    check.conclude()


def _problem_of(tensor: Tensor) -> str:
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    # Unlike isfinite, this allocates nothing; NaN comes through both.
    if all(math.isfinite(bound) for bound in torch.stack(tensor.detach().aminmax()).tolist()):
        return ""
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values"

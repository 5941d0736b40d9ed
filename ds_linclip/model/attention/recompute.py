"""Functions whose intermediate results the backward computes again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return ``function(*arguments)``; autograd keeps the arguments only.

    Pass parameters as they are, not values made of them: with ZeRO-3 a parameter is there in the
    backward too, and a value would be kept.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

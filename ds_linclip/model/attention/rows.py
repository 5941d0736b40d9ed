"""Rows of queries and keys: their precision, length and running mean."""

import torch
from torch import Tensor

__all__ = ["running_mean", "unit", "wide_dtype", "widened"]

#: Added to squared norms, as by the operator.
_EPS = 1e-6


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of ``x``, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32."""
    return x.to(wide_dtype(x))


def unit(x: Tensor) -> Tensor:
    """Return rows [..., D] over their norms."""
    return x * (x.square().sum(-1, keepdim=True) + _EPS).rsqrt()


def running_mean(x: Tensor) -> Tensor:
    """Return the mean of every row and those before it, of ``x`` [B, N, ...], in at least
    float32."""
    num_seen = torch.arange(1, x.shape[1] + 1, dtype=wide_dtype(x), device=x.device)
    return x.cumsum(1, dtype=wide_dtype(x)) / num_seen.view(-1, *[1] * (x.ndim - 2))

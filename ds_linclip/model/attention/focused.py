"""Focused linear attention of FLatten Transformer, arXiv 2308.00442."""

from typing import Any

import torch
from torch import Tensor

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import widened

__all__ = ["Attention"]


class Attention(LinearStateAttention):
    """Normalized linear attention with features that a power brings nearer to their largest axes
    and that keep their norm."""

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, ...]:
        q, k, v = self.project(x)
        q, k = (recomputed(_focus, each, self.settings.power) for each in (q, k))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return self.sum_values(q, k, v, feature_map="identity", qk_norm=False, normalized=True)


def _focus(x: Tensor, power: float) -> Tensor:
    """Return |r| r^p / |r^p| of r = relu(x) over the last axis; 0 for r = 0."""
    r = widened(x).relu()
    # The direction does not depend on the length of r; its largest entry becomes one, so that the
    # powers neither overflow nor vanish together, and their norm is at least one.
    largest = r.detach().amax(-1, keepdim=True)
    powers = (r / largest.where(largest > 0, 1)).pow(power)
    length = torch.linalg.vector_norm(powers, dim=-1, keepdim=True).clamp(min=1)
    return (torch.linalg.vector_norm(r, dim=-1, keepdim=True) * powers / length).to(x.dtype)

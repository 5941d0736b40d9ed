"""FAST: attention whose score is a Taylor polynomial of exp, arXiv 2402.07901."""

from typing import Any

from torch import Tensor

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import widened
from linclip_kernels.linear_attention.quadratic_map import num_quadratic_features

__all__ = ["Attention"]

#: Added to the largest |x|^2 of a sequence, as to that of every row by the operator.
_EPS = 1e-6


class Attention(LinearStateAttention):
    """The operator's affine or quadratic map, divided by the sum of scores, on queries and keys
    that are scaled row by row or by the largest norm of their sequence and head."""

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        return head_dim if settings.order == 1 else num_quadratic_features(head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        is_token = self.settings.qk_norm == "token"
        if not is_token:
            q, k = recomputed(_by_largest_norm, q), recomputed(_by_largest_norm, k)
        feature_map = "affine" if self.settings.order == 1 else "quadratic"
        return self.sum_values(q, k, v, feature_map=feature_map, qk_norm=is_token, normalized=True)


def _by_largest_norm(x: Tensor) -> Tensor:
    """Return rows [B, N, H, D] over the largest norm among their N rows."""
    wide = widened(x)
    largest = wide.square().sum(-1, keepdim=True).amax(1, keepdim=True)  # [B, 1, H, 1]
    return (wide * (largest + _EPS).rsqrt()).to(x.dtype)

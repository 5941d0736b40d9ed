"""Hedgehog: linear attention with learned features that are softmaxes, arXiv 2402.04347.

Query and key x have the features [softmax(A x), softmax(-A x)], both over the entries of a head:
the paper's exp(A x) and exp(-A x), each divided by its sum so that no exponential overflows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import wide_dtype

__all__ = ["Attention"]


class Attention(LinearStateAttention):
    """The operator on the features of queries and keys, which are neither normalized nor scaled
    before, as in the paper."""

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        head_dim = width // heads
        matrices = OwnParameter((heads, head_dim, head_dim), _set_identity)
        local = super().own_parameters(settings, width, heads, causal=causal)
        return {**local, "query_map": matrices, "key_map": matrices}

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        return 2 * head_dim

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        maps = 2 * 2 * head_dim**2
        return maps + super().flops(settings, head_dim, num_tokens, causal=causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        q = recomputed(_features, q, self.get_parameter("query_map"), v.dtype)
        k = recomputed(_features, k, self.get_parameter("key_map"), v.dtype)
        return self.sum_values(q, k, v, feature_map="identity", qk_norm=False, normalized=True)


def _set_identity(matrices: Tensor) -> None:
    matrices.copy_(torch.eye(matrices.shape[-1]).expand_as(matrices))


def _features(x: Tensor, matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the features [B, N, H, 2 D] of queries or keys [B, N, H, D], in ``dtype``."""
    wide = wide_dtype(x)
    mapped = torch.einsum("bnhd,hed->bnhe", x.to(wide), matrices.to(wide))
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1).to(dtype)

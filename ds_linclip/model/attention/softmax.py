"""Softmax attention, torch's SDPA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.model.attention.base import SelfAttention

__all__ = ["Attention", "softmax_attention"]


class Attention(SelfAttention):
    """Softmax attention with scores q.k / sqrt(head_dim), open_clip's."""

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        return 4 * head_dim * num_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return softmax_attention(q, k, v, is_causal=self.causal).transpose(1, 2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Return softmax attention as torch's SDPA, on the meta device too.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, H, M, D].
        v: Values [B, H, M, Dv].
        is_causal: Whether query i sees the keys up to i only.
        mask: Bool, broadcast to [B, H, N, M]: whether a query sees a key.

    Returns:
        [B, H, N, Dv].
    """
    if q.is_meta:
        # torch has fused kernels on real devices only; this one saves the same tensors.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        added = None if mask is None else mask.to(q.dtype)
        found: Tensor = fused(q, k, v, is_causal=is_causal, attn_mask=added)[0]
        return found
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

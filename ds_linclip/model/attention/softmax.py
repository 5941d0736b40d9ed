"""Softmax attention, torch's SDPA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.model.attention.base import SelfAttention

__all__ = ["Attention"]


class Attention(SelfAttention):
    """Softmax attention with scores q.k / sqrt(head_dim), open_clip's."""

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        return 4 * head_dim * num_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.is_meta:
            # torch has fused kernels on real devices only; this one saves the same tensors.
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(q, k, v, is_causal=self.causal)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

"""Self-attention of one block, linear or softmax: the only caller of ``linclip_kernels``."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import Attention
from ds_linclip.parallel.context_parallel import sum_over_ranks
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import HeadRMSNorm, column_parallel, row_parallel
from linclip_kernels import (
    linear_attention,
    linear_attention_from_state,
    linear_attention_state,
)

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head self-attention over ``[B, N, width]``, heads split over the tensor axis.

    The rows of the joint q, k, v projection are ordered [head, (q, k, v), head_dim] as in Megatron,
    so that a contiguous split of the rows is a split of the heads.

    Args:
        width: Size of a token's embedding; a multiple of ``heads``.
        heads: Number of heads; must be divisible by the tensor-parallel size.
        attention: Kind and settings. With ``kind="softmax"`` this is open_clip's attention.
        mesh: Splits heads (tensor axis) and tokens (context axis).
        causal: Whether a token attends only to itself and the tokens before it.
        init_qkv: Initializes the unsplit weight [3 * width, width].
        init_out: Initializes the unsplit weight [width, width].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        attention: Attention,
        mesh: Mesh,
        *,
        causal: bool,
        init_qkv: Callable[[Tensor], object],
        init_out: Callable[[Tensor], object],
    ) -> None:
        super().__init__()
        if heads % mesh.tp.size:
            raise ValueError(f"heads ({heads}) must be divisible by parallel.tp ({mesh.tp.size})")
        self.local_heads = heads // mesh.tp.size
        self.head_dim = width // heads
        self.attention = attention
        self.causal = causal
        #: Backend of linear attention; "auto": Triton on a GPU, torch otherwise.
        self.backend: Literal["auto", "torch", "triton"] = "auto"
        # The ranks that hold the other tokens of the same images; texts are not split.
        self.cp_group = mesh.cp.group if mesh.cp.size > 1 and not causal else None
        self.qkv = column_parallel(mesh, width, 3 * width, init=init_qkv)
        has_norm = attention.kind == "linear" and attention.head_norm
        self.head_norm = HeadRMSNorm(self.local_heads, self.head_dim) if has_norm else None
        self.out_proj = row_parallel(mesh, width, width, init=init_out)

    def forward(self, x: Tensor) -> Tensor:
        o = self.attend(*self.project(x))
        if self.head_norm is not None:
            o = self.head_norm(o)
        return self.out_proj(o.flatten(2))  # [B, N, H * D] -> [B, N, width]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of this rank's heads, [B, N, H, D] each, strided."""
        qkv = self.qkv(x).unflatten(-1, (self.local_heads, 3, self.head_dim))  # [B, N, H, 3, D]
        q, k, v = qkv.unbind(3)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the weighted sums of values [B, N, H, Dv] for every query, before the norm of the
        heads, from queries and keys [B, N, H, D] and values [B, N, H, Dv] of any heads.

        The result is linear in the values: rows of the identity as values give the weights.
        """
        if self.attention.kind == "linear":
            return self._linear_attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.is_meta:
            # torch has fused kernels on real devices only; this one saves the same tensors.
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(q, k, v, is_causal=self.causal)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

    def _linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features: Any = {"feature_map": self.attention.feature_map, "backend": self.backend}
        settings: Any = features | {
            "normalized": self.attention.normalized,
            "score_scale": self.attention.score_scale,
            "length_exponent": self.attention.length_exponent,
        }
        if self.cp_group is None:
            return linear_attention(q, k, v, causal=self.causal, **settings)
        state = sum_over_ranks(linear_attention_state(k, v, **features), self.cp_group)
        return linear_attention_from_state(q, state, **settings)

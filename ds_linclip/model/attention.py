"""Self-attention of one block, linear or softmax: the only caller of ``linclip_kernels``."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import Attention
from ds_linclip.parallel.context_parallel import sum_over_ranks
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import column_parallel, head_rms_norm, row_parallel
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
        width: features of a token; a multiple of ``heads``.
        attention: kind and settings. With ``kind="softmax"`` this is open_clip's attention.
        causal: let a token see only itself and those before it.
        init_qkv, init_out: run on the full weights [3 * width, width] and [width, width].

    Attributes:
        backend: of linear attention; "auto": Triton on a GPU, torch otherwise.
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
        self.backend: Literal["auto", "torch", "triton"] = "auto"
        # Ranks that hold other tokens of the same sequences; texts are whole on all of them.
        self.cp_group = mesh.cp.group if mesh.cp.size > 1 and not causal else None
        self.qkv = column_parallel(mesh, width, 3 * width, init=init_qkv)
        self.head_norm = (
            head_rms_norm(mesh, heads, self.head_dim)
            if attention.kind == "linear" and attention.head_norm
            else None
        )
        self.out_proj = row_parallel(mesh, width, width, init=init_out)

    def forward(self, x: Tensor) -> Tensor:
        o = self.attend(*self.project(x))
        if self.head_norm is not None:
            o = self.head_norm(o)
        return self.out_proj(o.flatten(2))  # [B, N, H * D] -> [B, N, width]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, [B, N, H, D] each, strided."""
        qkv = self.qkv(x).unflatten(-1, (self.local_heads, 3, self.head_dim))  # [B, N, H, 3, D]
        q, k, v = qkv.unbind(3)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What every query reads from the values: weighted sums, before the norm of the heads.

        It is linear in the values: of the rows of the identity it makes the weights themselves.

        Args:
            q, k: [B, N, H, D], of any heads.
            v: [B, N, H, Dv].

        Returns:
            [B, N, H, Dv].
        """
        if self.attention.kind == "linear":
            return self._linear_attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.is_meta:
            # torch has fused kernels for real devices alone; what they save is the same on all.
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(q, k, v, is_causal=self.causal)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

    def _linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        form = self.attention
        if self.cp_group is None:
            return linear_attention(
                q,
                k,
                v,
                causal=self.causal,
                normalized=form.normalized,
                feature_map=form.feature_map,
                score_scale=form.score_scale,
                length_exponent=form.length_exponent,
                backend=self.backend,
            )
        state = linear_attention_state(k, v, feature_map=form.feature_map, backend=self.backend)
        return linear_attention_from_state(
            q,
            sum_over_ranks(state, self.cp_group),
            normalized=form.normalized,
            feature_map=form.feature_map,
            score_scale=form.score_scale,
            length_exponent=form.length_exponent,
            backend=self.backend,
        )

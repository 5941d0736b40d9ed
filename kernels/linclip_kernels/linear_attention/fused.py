"""Linear attention in Triton: the launches of either order as one differentiable function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linclip_kernels.linear_attention import causal, noncausal
from linclip_kernels.linear_attention.eager import Form
from linclip_kernels.linear_attention.tiles import run

__all__ = ["linear_attention_triton"]


def linear_attention_triton(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    """The Triton form of :func:`linclip_kernels.linear_attention`; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        form: Which form.

    Returns:
        [B, N, H, Dv], contiguous, in v.dtype.
    """
    return _LinearAttention.apply(q, k, v, form)


class _LinearAttention(torch.autograd.Function):
    """Keeps q, k, v and a state for the backward, which a causal sequence of one part has not."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        plans = causal if form.causal else noncausal
        out, state, launches = plans.plan_forward(q, k, v, form)
        run(launches, q.device)
        ctx.save_for_backward(q, k, v, state)
        ctx.form = form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state = ctx.saved_tensors
        plans = causal if ctx.form.causal else noncausal
        d_q, d_k, d_v, launches = plans.plan_backward(q, k, v, grad, state, ctx.form)
        run(launches, q.device)
        # One term per value block; as a rule there is one.
        d_q, d_k = (x[0] if len(x) == 1 else x.sum(0).to(q.dtype) for x in (d_q, d_k))
        return d_q, d_k, d_v, None

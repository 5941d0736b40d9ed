"""The operators that torch knows: attention of q, k and v, or of a packed qkv, and their gradients.

torch.compile, autograd and activation checkpointing see ``linclip::linear_attention``,
``linclip::linear_attention_packed`` and the same with ``_backward``. Both read views of their
inputs and write into views of their gradients, with the same code.
"""

from typing import Any

import torch
from torch import Tensor

from linclip_kernels.linear_attention.autograd import (
    Differentiated,
    fold_vmap_into_batch,
    gradient_of,
)
from linclip_kernels.linear_attention.validation import (
    implementation,
    num_sequences,
    state_dtype,
    without_autocast,
)
from linclip_kernels.linear_attention.variant import VARIANT_SCHEMA, Variant

__all__ = ["Attend", "AttendPacked"]


def _define(name: str, inputs: str) -> type[Differentiated]:
    """Register an operator and its backward, and return the function that autograd knows.

    Args:
        name: Its name in torch.
        inputs: The inputs in the language of torch's schemas: q, k and v, or qkv.
    """
    count = inputs.count("Tensor")
    arguments = f"{inputs}, Tensor? initial, Tensor? cu_seqlens"
    gradients = "Tensor? state, Tensor? grad, Tensor? grad_state"

    @torch.library.custom_op(
        f"linclip::{name}",
        mutates_args=(),
        schema=f"({arguments}, {VARIANT_SCHEMA}, bool return_state, bool use_triton) "
        "-> (Tensor, Tensor)",
    )
    def operator(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*_views(arguments[:count]), *arguments[count:])

    @operator.register_fake
    def _(*arguments: Any) -> Any:
        return _forward_fake(*_views(arguments[:count]), *arguments[count:])

    @torch.library.custom_op(
        f"linclip::{name}_backward",
        mutates_args=(),
        schema=f"({arguments}, {gradients}, {VARIANT_SCHEMA}, bool use_triton) "
        f"-> ({'Tensor, ' * count}Tensor)",
    )
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = arguments[:count]
        found = _empty_like(inputs)
        return *found, _backward(*_views(inputs), *arguments[count:], gradients=_views(found))

    @backward.register_fake
    def _(*arguments: Any) -> Any:
        inputs, initial = arguments[:count], arguments[count]
        like_initial = inputs[0].new_empty(0) if initial is None else torch.empty_like(initial)
        return *_empty_like(inputs), like_initial

    gradient = gradient_of(backward)
    fold_vmap_into_batch(operator)

    class WithGradient(Differentiated):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            *tensors, ctx.return_state, ctx.use_triton = inputs
            *tensors, ctx.variant = *tensors[: count + 2], Variant(*tensors[count + 2 :])
            reads_state = ctx.use_triton and not ctx.variant.causal
            ctx.save_for_backward(*tensors, output[1] if reads_state else None)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
            if not ctx.return_state:
                grad_state = None
            inputs = ctx.saved_tensors
            *found, d_initial = gradient.apply(
                *inputs, grad, grad_state, *ctx.variant, ctx.use_triton
            )
            d_initial = d_initial if inputs[count] is not None else None
            return *found, d_initial, *(None,) * (len(ctx.variant) + 3)

    return WithGradient


def _views(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return q, k and v [B, N, H, *], views of the one packed tensor [B, N, H, 3, D] if it is."""
    return inputs if len(inputs) == 3 else inputs[0].unbind(3)


def _empty_like(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Return o, and the state if it is requested or needed by the backward, or an empty tensor."""
    *fields, return_state, use_triton = options
    variant = Variant(*fields)
    boundaries = _boundaries(cu_seqlens, q.shape[1])
    keep_state = _keep_state(q, cu_seqlens, initial, variant.causal, return_state, use_triton)
    with without_autocast(q.device):
        out, state = implementation(use_triton).forward(
            q, k, v, initial, boundaries, variant, return_state=keep_state
        )
    return out, q.new_empty(0, dtype=state_dtype(q)) if state is None else state


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, initial: Any, cu_seqlens: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    causal, *_, return_state, use_triton = options
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not _keep_state(q, cu_seqlens, initial, causal, return_state, use_triton):
        return out, q.new_empty(0, dtype=state_dtype(q))
    shape = num_sequences(q, cu_seqlens), q.shape[2], q.shape[3] + 1, v.shape[3] + 1
    return out, q.new_empty(shape, dtype=state_dtype(q))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    grad: Tensor | None,
    grad_state: Tensor | None,
    *options: Any,
    gradients: tuple[Tensor, ...],
) -> Tensor:
    """Write the gradients of q, k and v; return that of the initial state, or an empty tensor."""
    *fields, use_triton = options
    variant = Variant(*fields)
    boundaries = _boundaries(cu_seqlens, q.shape[1])
    kept = None if state is None or not state.numel() else state
    with without_autocast(q.device):
        d_initial = implementation(use_triton).backward(
            q, k, v, initial, boundaries, variant, kept, grad, grad_state, gradients
        )
    return q.new_empty(0) if d_initial is None else d_initial


def _keep_state(
    q: Tensor,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    causal: bool,
    return_state: bool,
    use_triton: bool,
) -> bool:
    """Return whether the forward writes the state of all keys.

    The backward of the bidirectional kernels reads it. In short sequences the state would be as
    large as q, k and v, and the backward computes it again.
    """
    short = cu_seqlens is None and q.shape[1] < 8 * q.shape[3]
    return return_state or (use_triton and not causal and (initial is not None or not short))


def _boundaries(cu_seqlens: Tensor | None, num_tokens: int) -> list[int] | None:
    """Read and check boundaries: inside the operator, where values exist also when compiled."""
    if cu_seqlens is None:
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cu_seqlens cannot be captured in a CUDA graph: it is read on the host")
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num_tokens or values != sorted(values):
        shown = values if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
        raise ValueError(f"cu_seqlens {shown} must ascend from 0 to N ({num_tokens})")
    return values


Attend = _define("linear_attention", "Tensor q, Tensor k, Tensor v")
AttendPacked = _define("linear_attention_packed", "Tensor qkv")

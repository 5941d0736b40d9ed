"""The public operator: it checks its arguments and calls a custom operator that computes.

torch.compile, autograd, activation checkpointing and autocast see two opaque operators,
``linclip::linear_attention`` and ``linclip::linear_attention_backward``.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from linclip_kernels.linear_attention.autograd import (
    Differentiated,
    fold_vmap_into_batch,
    gradient_of,
)
from linclip_kernels.linear_attention.quadratic_map import attend_quadratic
from linclip_kernels.linear_attention.validation import (
    Backend,
    FeatureMap,
    as_boundaries,
    cast_for_autocast,
    check_state,
    check_tensors,
    check_variant,
    implementation,
    state_dtype,
    takes_triton,
    without_autocast,
)
from linclip_kernels.linear_attention.variant import VARIANT_SCHEMA, Variant

__all__ = ["linear_attention"]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    normalized: bool = ...,
    qk_norm: bool = ...,
    feature_map: FeatureMap = ...,
    score_scale: float = ...,
    length_exponent: float = ...,
    qk_scale: float = ...,
    centered: bool = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    normalized: bool = ...,
    qk_norm: bool = ...,
    feature_map: FeatureMap = ...,
    score_scale: float = ...,
    length_exponent: float = ...,
    qk_scale: float = ...,
    centered: bool = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalized: bool = False,
    qk_norm: bool = True,
    feature_map: FeatureMap = "affine",
    score_scale: float = 0.5,
    length_exponent: float = 0.0,
    qk_scale: float = 1.0,
    centered: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention in time and memory linear in the number of tokens.

    With n keys in view of a row (all of its sequence, or those up to the row when causal, and those
    of the initial state), f the score of a query and a key, q and k of unit length:
    normalized (Eq. 4): o_i = sum_n f(q_i, k_n) v_n / sum_n f(q_i, k_n);
    otherwise (Eq. 7): o_i = score_scale * n^-length_exponent * sum_n f(q_i, k_n) v_n.
    Centred scores are f(q_i, k_n) = 1 + qk_scale * q_i.(k_n - mean of the keys in view); those of a
    row sum to n exactly, so that with normalized=True weights sum to 1 without a denominator.

    The state is one additive float32 matrix per sequence and head,

        sum over keys of (1, phi(k)) (v, 1)^T   [F + 1, Dv + 1]

    whose last entry of the first row is the number of keys. States of disjoint keys add up: over
    ranks that hold parts of a sequence, or over successive calls on a stream.

    Args:
        q, k: [B, N, H, D], float32, bfloat16, float16 or (torch only) float64; any strides, so that
            views of a packed [B, N, H, 3, D] are read in place. Under autocast all three are cast
            to its dtype, as by torch's own attention.
        v: [B, N, H, Dv], dtype and device of q.
        causal: Row i sees keys 1 to i.
        normalized: Divide by the sum of scores, clamped to at least 1e-6 per key. Where it is
            clamped no gradient passes through it. With the affine map, a row with one key and no
            initial state returns that key's value.
        qk_norm: Scale the rows of q and k by (|x|^2 + 1e-6)^-1/2. A row whose |x|^2 overflows (|x|
            above 1.8e19 in float32) counts as NaN. Without the norm, and with the affine
            map, the caller must ensure |x| <= 1 unless scores are centred.
        feature_map: The score f of x = qk_scale * q.k: "affine", 1 + x; "quadratic",
            1 + x + x^2 / 2; or qk_scale * phi(q).phi(k) with phi "relu", "softplus" or "identity",
            applied elementwise; use "identity" for features that the caller has computed, a
            learned map for example.
        score_scale: Factor of o in Eq. 7.
        length_exponent: Power of 1/n in Eq. 7.
        qk_scale: Factor of q.k in the score.
        centered: Subtract from q.k its mean over the keys in view; with the affine map only. A row
            with one key and no initial state then has the score 1, for any q and k.
        cu_seqlens: Boundaries [S + 1] of S sequences that are concatenated along N; B is 1.
            Integers from 0 to N in ascending order, a tensor or a sequence. They are read on the
            host, which waits for the device if they lie on it.
        initial_state: State [S, H, F + 1, Dv + 1] of keys that come before the sequence, float32
            (float64 for float64 inputs). S = B without cu_seqlens, F = D except for the quadratic
            map, where F = D + D (D // 2 + 1). Its number of keys is not differentiated. A state of
            zeros also counts as an initial state: the rule for a row with one key does not apply.
        return_state: Also return the state of all keys, the initial ones included.
        backend: "triton", "torch", or "auto": Triton for CUDA tensors, torch otherwise.

    Returns:
        o [B, N, H, Dv], contiguous, in the dtype of v; with return_state (o, state). Both can be
        differentiated once.

    Raises:
        ValueError: Shapes, dtypes, devices or boundaries are invalid, N is 0, or the backend does
            not support these tensors.
        RuntimeError: A second or a forward-mode derivative is requested, or cu_seqlens is given
            while a CUDA graph is captured.

    Source: arXiv 2604.10064, Eq. 4 and Eq. 7; centred scores: arXiv 2412.06590.
    """
    q, k, v = cast_for_autocast(q, k, v)
    variant = Variant(
        causal,
        normalized,
        qk_norm,
        feature_map,
        score_scale,
        length_exponent,
        qk_scale,
        centered,
    )
    check_variant(variant)
    check_tensors(q=q, k=k, v=v)
    boundaries = as_boundaries(cu_seqlens, q)
    if initial_state is not None:
        num_sequences, value_dim = _num_sequences(q, boundaries), v.shape[3]
        check_state(
            "initial_state",
            initial_state,
            q,
            feature_map,
            num_sequences=num_sequences,
            value_dim=value_dim,
        )
    use_triton = takes_triton(backend, q, {"q.shape[-1]": q.shape[3], "v.shape[-1]": v.shape[3]})

    def attend(
        q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        options = *variant.without_known_sums(), return_state, use_triton
        result = _Attend.apply(q, k, v, initial, boundaries, *options)
        return cast(tuple[Tensor, Tensor], result)

    if feature_map == "quadratic":
        out, state = attend_quadratic(
            attend, q, k, v, initial_state, variant, return_state=return_state
        )
    else:
        out, state = attend(q, k, v, initial_state, variant)
        if return_state and use_triton and not causal:
            state = state.clone()  # the backward reads it, and the caller may change theirs
    return (out, state) if return_state else out


@torch.library.custom_op(
    "linclip::linear_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, {VARIANT_SCHEMA}, "
    "bool return_state, bool use_triton) -> (Tensor, Tensor)",
)
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


@torch.library.custom_op(
    "linclip::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens, Tensor? state, "
    f"Tensor? grad, Tensor? grad_state, {VARIANT_SCHEMA}, bool use_triton) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the initial state, the last empty if there is none."""
    *fields, use_triton = options
    variant = Variant(*fields)
    boundaries = _boundaries(cu_seqlens, q.shape[1])
    kept = None if state is None or not state.numel() else state
    with without_autocast(q.device):
        d_q, d_k, d_v, d_initial = implementation(use_triton).backward(
            q, k, v, initial, boundaries, variant, kept, grad, grad_state
        )
    return d_q, d_k, d_v, d_q.new_empty(0) if d_initial is None else d_initial


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial: Any, cu_seqlens: Any, *options: Any) -> Any:
    causal, *_, return_state, use_triton = options
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not _keep_state(q, cu_seqlens, initial, causal, return_state, use_triton):
        return out, q.new_empty(0, dtype=state_dtype(q))
    num_sequences = _num_sequences(q, cu_seqlens)
    shape = num_sequences, q.shape[2], q.shape[3] + 1, v.shape[3] + 1
    return out, q.new_empty(shape, dtype=state_dtype(q))


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial: Any, *_: Any) -> Any:
    gradients = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return *gradients, q.new_empty(0) if initial is None else initial.new_empty(initial.shape)


_AttendBackward = gradient_of(_backward)
fold_vmap_into_batch(_forward)


class _Attend(Differentiated):
    """:func:`_forward` with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.return_state, ctx.use_triton = inputs
        *tensors, ctx.variant = *tensors[:5], tensors[5:]
        reads_state = ctx.use_triton and not ctx.variant[0]
        ctx.save_for_backward(*tensors, output[1] if reads_state else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
        if not ctx.return_state:
            grad_state = None
        inputs = ctx.saved_tensors
        d_q, d_k, d_v, d_initial = _AttendBackward.apply(
            *inputs, grad, grad_state, *ctx.variant, ctx.use_triton
        )
        d_initial = d_initial if inputs[3] is not None else None
        return d_q, d_k, d_v, d_initial, *(None,) * (len(ctx.variant) + 3)


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


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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

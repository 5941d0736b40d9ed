"""The public operator, of q, k and v or of a packed qkv: it checks its arguments and calls a custom
operator that computes."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from linclip_kernels.linear_attention.operators import Attend, AttendPacked
from linclip_kernels.linear_attention.quadratic_map import attend_quadratic
from linclip_kernels.linear_attention.validation import (
    Backend,
    FeatureMap,
    as_boundaries,
    cast_for_autocast,
    check_packed,
    check_state,
    check_tensors,
    check_variant,
    num_sequences,
    takes_triton,
)
from linclip_kernels.linear_attention.variant import Variant

__all__ = ["linear_attention", "linear_attention_packed"]


class Options(TypedDict, total=False):
    """The keyword arguments of both functions that do not change the type of the result."""

    causal: bool
    normalized: bool
    qk_norm: bool
    feature_map: FeatureMap
    score_scale: float
    length_exponent: float
    qk_scale: float
    centered: bool
    cu_seqlens: Tensor | Sequence[int] | None
    initial_state: Tensor | None
    backend: Backend


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: Unpack[Options]
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
    inputs = cast_for_autocast(q, k, v)
    check_tensors(q=inputs[0], k=inputs[1], v=inputs[2])
    return _attend(inputs, variant, cu_seqlens, initial_state, return_state, backend)


@overload
def linear_attention_packed(
    qkv: Tensor, *, return_state: Literal[False] = ..., **options: Unpack[Options]
) -> Tensor: ...
@overload
def linear_attention_packed(
    qkv: Tensor, *, return_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def linear_attention_packed(
    qkv: Tensor,
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
    """Compute :func:`linear_attention` of one packed tensor, whose gradient is one packed tensor.

    The results are those of ``linear_attention(*qkv.unbind(3), ...)``, bit for bit, but the
    backward writes the gradients of q, k and v into one tensor, as the projection that gave qkv
    reads them, where autograd would stack three. The quadratic map still stacks them.

    Args:
        qkv: [B, N, H, 3, D], dtypes and strides as in :func:`linear_attention`. The heads come
            before q, k and v, as in Megatron-LM, so that a contiguous part of the projection's rows
            belongs to some of the heads; FlashAttention packs [B, N, 3, H, D].
        causal, normalized, qk_norm, feature_map, score_scale, length_exponent, qk_scale, centered,
        cu_seqlens, initial_state, return_state, backend: The arguments of :func:`linear_attention`.

    Returns:
        o [B, N, H, D], contiguous; with return_state (o, state). Both can be differentiated once.

    Raises:
        ValueError: As :func:`linear_attention` does, or qkv is not [B, N, H, 3, D].
        RuntimeError: As :func:`linear_attention` does.

    Source: arXiv 2604.10064, Eq. 4 and Eq. 7; centred scores: arXiv 2412.06590.
    """
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
    check_packed(qkv)
    inputs = cast_for_autocast(qkv)
    return _attend(inputs, variant, cu_seqlens, initial_state, return_state, backend)


def _attend(
    inputs: tuple[Tensor, ...],
    variant: Variant,
    cu_seqlens: Tensor | Sequence[int] | None,
    initial_state: Tensor | None,
    return_state: bool,
    backend: Backend,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of q, k and v or of qkv, which are checked."""
    check_variant(variant)
    is_packed = len(inputs) == 1
    q, v = (inputs[0].select(3, i) for i in (0, 2)) if is_packed else (inputs[0], inputs[2])
    boundaries = as_boundaries(cu_seqlens, q)
    if initial_state is not None:
        check_state(
            "initial_state",
            initial_state,
            q,
            variant.feature_map,
            num_sequences=num_sequences(q, boundaries),
            value_dim=v.shape[3],
        )
    q_name, v_name = ("qkv", "qkv") if is_packed else ("q", "v")
    dims = {f"{q_name}.shape[-1]": q.shape[3], f"{v_name}.shape[-1]": v.shape[3]}
    use_triton = takes_triton(backend, q, dims)

    is_quadratic = variant.feature_map == "quadratic"  # composed of calls with three tensors
    function = AttendPacked if is_packed and not is_quadratic else Attend

    def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, initial, variant = arguments
        options = *variant.without_known_sums(), return_state, use_triton
        found: tuple[Tensor, Tensor] = function.apply(*tensors, initial, boundaries, *options)
        return found

    if is_quadratic:
        q, k, v = inputs[0].unbind(3) if is_packed else inputs
        out, state = attend_quadratic(
            attend, q, k, v, initial_state, variant, return_state=return_state
        )
    else:
        out, state = attend(*inputs, initial_state, variant)
        if return_state and use_triton and not variant.causal:
            state = state.clone()  # the backward reads it, and the caller may change theirs
    return (out, state) if return_state else out

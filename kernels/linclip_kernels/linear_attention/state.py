"""The bidirectional operator in two halves: the state of the keys, and the queries that see it.

Between the halves the state can be summed over processes that hold parts of the keys, or be kept
for other queries. As in operators.py, each half is a registered custom operator with a backward,
``linclip::linear_attention_state`` and ``linclip::linear_attention_from_state``.
"""

from typing import Any, cast

import torch
from torch import Tensor

from linclip_kernels.linear_attention.autograd import differentiated
from linclip_kernels.linear_attention.quadratic_map import apply_quadratic_state, sum_quadratic_keys
from linclip_kernels.linear_attention.validation import (
    Backend,
    FeatureMap,
    cast_for_autocast,
    check_choice,
    check_state,
    check_tensors,
    check_variant,
    implementation,
    state_dtype,
    takes_triton,
    without_autocast,
)
from linclip_kernels.linear_attention.variant import VARIANT_SCHEMA, Variant

__all__ = ["linear_attention_from_state", "linear_attention_state"]


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    *,
    qk_norm: bool = True,
    feature_map: FeatureMap = "affine",
    backend: Backend = "auto",
) -> Tensor:
    """Sum (1, phi(k)) (v, 1)^T over all keys: the state that :func:`linear_attention` returns.

    Args:
        k: [B, N, H, D], dtypes and strides as in :func:`linear_attention`. N = 0 gives zeros.
        v: [B, N, H, Dv], dtype and device of k.
        qk_norm, feature_map, backend: The arguments of :func:`linear_attention`.

    Returns:
        [B, H, F + 1, Dv + 1], float32 (float64 for float64 inputs). It can be differentiated once,
        and may be changed in place. The last entry of its first row is the number of keys.

    Raises:
        ValueError: Shapes, dtypes or devices are invalid, or the backend does not support them.
        RuntimeError: A second or a forward-mode derivative is requested.

    Source: README.md beside this file, "The state".
    """
    k, v = cast_for_autocast(k, v)
    check_choice("feature_map", feature_map, FeatureMap)
    check_tensors(k=k, v=v, may_be_empty=True)
    dims = {"k.shape[-1]": k.shape[3], "v.shape[-1]": v.shape[3]}
    use_triton = takes_triton(backend, k, dims)
    variant = Variant(qk_norm=qk_norm, feature_map=feature_map)

    def sum_keys(k: Tensor, v: Tensor, variant: Variant) -> Tensor:
        result = _SumKeys.apply(k, v, variant.qk_norm, variant.feature_map, use_triton)
        return cast(Tensor, result)

    if feature_map == "quadratic":
        return sum_quadratic_keys(sum_keys, k, v, variant)
    return sum_keys(k, v, variant)


def linear_attention_from_state(
    q: Tensor,
    state: Tensor,
    *,
    normalized: bool = False,
    qk_norm: bool = True,
    feature_map: FeatureMap = "affine",
    score_scale: float = 0.5,
    length_exponent: float = 0.0,
    qk_scale: float = 1.0,
    centered: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute attention of queries to all keys of a state.

    With ``state = linear_attention_state(k, v)`` the output and gradients are those of
    ``linear_attention(q, k, v)`` up to rounding, also with a single key. There may be any number of
    queries: for cross-attention, or some of the queries of a sequence whose keys are on many ranks.
    Keys are centred here, so that states of parts of the keys can be added before.

    Args:
        q: [B, N, H, D], dtypes and strides as in :func:`linear_attention`, cast under autocast. N
            may be 0.
        state: [B, H, F + 1, Dv + 1] from :func:`linear_attention_state`, or a sum of such states,
            with the same qk_norm and feature map. Its number of keys is not differentiated; if it
            is 0, Eq. 4 and a length factor give NaN.
        normalized, qk_norm, feature_map, score_scale, length_exponent, qk_scale, centered, backend:
            The arguments of :func:`linear_attention`.

    Returns:
        o [B, N, H, Dv], contiguous, in the dtype of q. It can be differentiated once.

    Raises:
        ValueError: Shapes, dtypes or devices are invalid, or the backend does not support them.
        RuntimeError: A second or a forward-mode derivative is requested.

    Source: arXiv 2604.10064, Eq. 4 (normalized) and Eq. 7; centred scores: arXiv 2412.06590.
    """
    (q,) = cast_for_autocast(q)
    variant = Variant(
        False,
        normalized,
        qk_norm,
        feature_map,
        score_scale,
        length_exponent,
        qk_scale,
        centered,
    )
    check_variant(variant)
    check_tensors(q=q, may_be_empty=True)
    check_state("state", state, q, feature_map, num_sequences=q.shape[0])
    dims = {"q.shape[-1]": q.shape[3], "state.shape[-1] - 1": state.shape[3] - 1}
    use_triton = takes_triton(backend, q, dims)

    def apply_state(q: Tensor, state: Tensor, variant: Variant) -> Tensor:
        options = *variant.without_known_sums(), use_triton
        return cast(Tensor, _ApplyState.apply(q, state, *options))

    if feature_map == "quadratic":
        return apply_quadratic_state(apply_state, q, state, variant)
    return apply_state(q, state, variant)


@torch.library.custom_op("linclip::linear_attention_state", mutates_args=())
def _sum_keys(k: Tensor, v: Tensor, qk_norm: bool, feature_map: str, use_triton: bool) -> Tensor:
    variant = Variant(qk_norm=qk_norm, feature_map=feature_map)
    with without_autocast(k.device):
        return implementation(use_triton).sum_keys(k, v, variant)


@torch.library.custom_op("linclip::linear_attention_state_backward", mutates_args=())
def _sum_keys_backward(
    k: Tensor, v: Tensor, grad_state: Tensor, qk_norm: bool, feature_map: str, use_triton: bool
) -> tuple[Tensor, Tensor]:
    variant = Variant(qk_norm=qk_norm, feature_map=feature_map)
    with without_autocast(k.device):
        return implementation(use_triton).sum_keys_backward(k, v, variant, grad_state)


@torch.library.custom_op(
    "linclip::linear_attention_from_state",
    mutates_args=(),
    schema=f"(Tensor q, Tensor state, {VARIANT_SCHEMA}, bool use_triton) -> Tensor",
)
def _apply_state(q: Tensor, state: Tensor, *options: Any) -> Tensor:
    *fields, use_triton = options
    variant = Variant(*fields)
    with without_autocast(q.device):
        return implementation(use_triton).apply_state(q, state, variant)


@torch.library.custom_op(
    "linclip::linear_attention_from_state_backward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor state, Tensor grad, {VARIANT_SCHEMA}, bool use_triton) "
    "-> (Tensor, Tensor)",
)
def _apply_state_backward(
    q: Tensor, state: Tensor, grad: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    *fields, use_triton = options
    variant = Variant(*fields)
    with without_autocast(q.device):
        return implementation(use_triton).apply_state_backward(q, state, variant, grad)


@_sum_keys.register_fake
def _(k: Tensor, v: Tensor, *_: Any) -> Tensor:
    batch, heads, key_dim = k.shape[0], *k.shape[2:]
    return k.new_empty(batch, heads, key_dim + 1, v.shape[3] + 1, dtype=state_dtype(k))


@_apply_state.register_fake
def _(q: Tensor, state: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], state.shape[3] - 1)


@_sum_keys_backward.register_fake
@_apply_state_backward.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


_SumKeys = differentiated(_sum_keys, _sum_keys_backward)
_ApplyState = differentiated(_apply_state, _apply_state_backward)

# mypy: allow-untyped-defs
"""Bidirectional linear attention in Triton: the state of all keys, then every row by itself.

Where a sequence is one part, one launch does it all. Otherwise the parts' states are summed first.
Forward reads k, v, then q and writes o; backward reads q, do, then k, v and writes dq, dk, dv.
The derivation is in README.md beside this file.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend.partition import Call, Launch, Split
from linclip_kernels.linear_attention.triton_backend.primitives import (
    LENGTHS,
    at_head,
    combine_states,
    dot,
    dot_state,
    features,
    features_backward,
    fold_rows,
    load_state,
    load_tile,
    narrow,
    program_place,
    row_scale,
    store_state,
    store_tile,
    sum_states,
    sum_tokens,
)
from linclip_kernels.linear_attention.variant import Form

__all__ = [
    "plan_apply",
    "plan_apply_backward",
    "plan_backward",
    "plan_forward",
    "plan_state",
    "plan_state_backward",
]


def plan_forward(call: Call, out: Tensor, state: Tensor | None) -> list[Launch]:
    """The launches that fill ``out`` [B, N, H, Dv] and, if wanted, ``state`` [S, H, D+1, Dv+1]."""
    split = call.split
    if call.is_whole:
        keys = _key_arguments(call.k, call.v)
        return [_launch_forward(call.q, out, call.arguments, split, None, state, keys)]
    if state is None:
        state = split.empty_states(split.num_sequences)
    launches = plan_state(call.k, call.v, state, split, call.form, initial=call.initial)
    return [*launches, plan_apply(call.q, state, out, split, call.arguments)]


def plan_backward(
    call: Call,
    state: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, list[Launch]]:
    """The launches that fill dq, dk and dv, and the gradient of the initial state if there is one.

    Args:
        state: The state of all keys, if the forward has kept it.
    """
    q, k, v, split, arguments = call.q, call.k, call.v, call.split, call.arguments
    d_q, d_k, d_v = gradients
    if call.is_whole and grad_state is None:
        sides = _query_side(q, grad, d_q) | _key_side(k, v, d_k, d_v)
        return None, [_launch_backward(sides, state, None, split, arguments)]
    launches: list[Launch] = []
    if state is None:
        state = split.empty_states(split.num_sequences)
        launches = plan_state(k, v, state, split, call.form, initial=call.initial)
    d_state = split.empty_states(split.num_sequences)
    launches += plan_apply_backward(
        q, state, grad, d_q, d_state, split, arguments, grad_state=grad_state
    )
    launches.append(plan_state_backward(k, v, d_state, d_k, d_v, split, arguments))
    return d_state, launches


def plan_state(
    k: Tensor, v: Tensor, state: Tensor, split: Split, form: Form, *, initial: Tensor | None = None
) -> list[Launch]:
    """The launches that fill ``state`` [S, H, D + 1, Dv + 1] with the sums over keys."""
    if split.is_whole and initial is None:
        return [sum_states(k, v, None, state, split, form)]
    parts = split.empty_parts()
    return [
        sum_states(k, v, None, parts, split, form),
        combine_states(parts, split, start=initial, total=state),
    ]


def plan_state_backward(
    k: Tensor,
    v: Tensor,
    d_state: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    split: Split,
    arguments: dict[str, Any],
) -> Launch:
    """The launch that fills dk and dv from the gradient of the state."""
    sides = _key_side(k, v, d_k, d_v) | _NO_QUERY_SIDE
    return _launch_backward(sides, None, d_state, split, arguments)


def plan_apply(
    q: Tensor, state: Tensor, out: Tensor, split: Split, arguments: dict[str, Any]
) -> Launch:
    """The launch that fills ``out`` [B, N, H, Dv] from the state of all keys."""
    return _launch_forward(q, out, arguments, split, state, None, _key_arguments(None, None))


def plan_apply_backward(
    q: Tensor,
    state: Tensor,
    grad: Tensor,
    d_q: Tensor,
    d_state: Tensor,
    split: Split,
    arguments: dict[str, Any],
    *,
    grad_state: Tensor | None = None,
) -> list[Launch]:
    """The launches that fill dq, and ``d_state`` with ``grad_state`` and the queries' share."""
    sides = _query_side(q, grad, d_q) | _NO_KEY_SIDE
    if split.is_whole and grad_state is None:
        return [_launch_backward(sides, state, d_state, split, arguments)]
    parts = split.empty_parts()
    return [
        _launch_backward(sides, state, parts, split, arguments),
        combine_states(parts, split, start=grad_state, total=d_state),
    ]


def _launch_forward(
    q: Tensor,
    out: Tensor,
    arguments: dict[str, Any],
    split: Split,
    state: Tensor | None,
    save: Tensor | None,
    keys: dict[str, Any],
) -> Launch:
    tensors = {
        "p_q": q,
        "p_out": out,
        "stride_q": q.stride(),
        "stride_out": out.stride(),
        "p_state": state,
        "p_save": save,
    }
    return Launch(_forward_kernel, split.grid, tensors | keys | arguments, split.num_warps)


def _launch_backward(
    sides: dict[str, Any],
    state: Tensor | None,
    d_state: Tensor | None,
    split: Split,
    arguments: dict[str, Any],
) -> Launch:
    states = {"p_state": state, "p_dstate": d_state}
    return Launch(_backward_kernel, split.grid, sides | states | arguments, split.num_warps)


def _key_arguments(k: Tensor | None, v: Tensor | None) -> dict[str, Any]:
    return {"p_k": k, "p_v": v, "stride_k": _stride(k), "stride_v": _stride(v)}


def _key_side(
    k: Tensor | None, v: Tensor | None, d_k: Tensor | None, d_v: Tensor | None
) -> dict[str, Any]:
    gradients = {"p_dk": d_k, "p_dv": d_v, "stride_dk": _stride(d_k), "stride_dv": _stride(d_v)}
    return _key_arguments(k, v) | gradients


def _query_side(q: Tensor | None, grad: Tensor | None, d_q: Tensor | None) -> dict[str, Any]:
    strides = {"stride_q": _stride(q), "stride_do": _stride(grad), "stride_dq": _stride(d_q)}
    return {"p_q": q, "p_do": grad, "p_dq": d_q} | strides


def _stride(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


_NO_KEY_SIDE, _NO_QUERY_SIDE = _key_side(None, None, None, None), _query_side(None, None, None)


@triton.jit
def query_rows(
    b_q,
    b_z,
    num_keys,
    p_factor,
    scale,
    i_n,
    i_d,
    length,
    D: tl.constexpr,
    NORMALIZED: tl.constexpr,
    QK_NORM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    FREE_SINGLE_KEY: tl.constexpr,
):
    """Features of q as (a, factor, inverse norm), the rows' scale, where no clamp holds them."""
    b_a, b_factor, b_inverse = features(b_q, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
    if FREE_SINGLE_KEY:
        b_factor = tl.where(num_keys == 1, 0.0, b_factor)
    b_denominator = b_factor
    if NORMALIZED:
        b_denominator = b_factor * tl.sum(b_a.to(tl.float32) * b_z[None, :], axis=1)
        if HAS_CONSTANT:
            b_denominator += num_keys
    b_scale, free = row_scale(b_denominator, num_keys, p_factor, i_n, length, scale, NORMALIZED)
    return b_a, b_factor, b_inverse, b_scale, free


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_state,
    p_factor,
    p_out,
    p_save,
    p_table,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    scale,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZED: tl.constexpr,
    QK_NORM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    FREE_SINGLE_KEY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS_D: tl.constexpr,
    ROWS_DV: tl.constexpr,
):
    _i_part, i_s, i_h, i_b, offset, length, first, end = program_place(
        p_table, num_tokens, num_heads, num_parts, part
    )
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if p_state is None:
        b_s, b_w, b_z = sum_tokens(
            at_head(p_k, stride_k, i_b, i_h, offset),
            at_head(p_v, stride_v, i_b, i_h, offset),
            None,
            stride_k,
            stride_v,
            num_tokens,
            first,
            end,
            length,
            D,
            DV,
            QK_NORM,
            FEATURE_MAP,
            HAS_CONSTANT,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            ROWS_D,
            ROWS_DV,
        )
        num_keys = length.to(tl.float32)
        if p_save is not None:
            store_state(p_save, i_s * num_heads + i_h, b_s, b_w, b_z, num_keys, i_d, i_v, D, DV)
    else:
        b_s, b_w, b_z, num_keys = load_state(p_state, i_s * num_heads + i_h, i_d, i_v, D, DV)
    p_q = at_head(p_q, stride_q, i_b, i_h, offset)
    p_out = at_head(p_out, stride_out, i_b, i_h, offset)
    if p_factor is not None:
        p_factor += i_b * num_tokens + offset
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
        b_a, b_factor, _inverse, b_scale, _free = query_rows(
            b_q,
            b_z,
            num_keys,
            p_factor,
            scale,
            i_n,
            i_d,
            length,
            D,
            NORMALIZED,
            QK_NORM,
            FEATURE_MAP,
            HAS_CONSTANT,
            FREE_SINGLE_KEY,
        )
        b_out = dot_state(b_a, b_s) * b_factor[:, None]  # [BLOCK_N, BLOCK_DV]
        if HAS_CONSTANT:
            b_out += b_w[None, :]
        store_tile(p_out, stride_out, b_out * b_scale[:, None], i_n, i_v, length, DV)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_state,
    p_factor,
    p_dstate,
    p_dq,
    p_dk,
    p_dv,
    p_table,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dq,
    stride_dk,
    stride_dv,
    scale,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZED: tl.constexpr,
    QK_NORM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    FREE_SINGLE_KEY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS_D: tl.constexpr,
    ROWS_DV: tl.constexpr,
):
    """Without p_dk the side of the queries alone, without p_dq that of the keys."""
    i_part, i_s, i_h, i_b, offset, length, first, end = program_place(
        p_table, num_tokens, num_heads, num_parts, part
    )
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if p_dk is not None:
        p_k = at_head(p_k, stride_k, i_b, i_h, offset)
        p_v = at_head(p_v, stride_v, i_b, i_h, offset)

    if p_dq is None:
        b_ds, b_dw, b_dz, _none = load_state(p_dstate, i_s * num_heads + i_h, i_d, i_v, D, DV)
    else:
        if p_state is None:
            b_s, b_w, b_z = sum_tokens(
                p_k,
                p_v,
                None,
                stride_k,
                stride_v,
                num_tokens,
                first,
                end,
                length,
                D,
                DV,
                QK_NORM,
                FEATURE_MAP,
                HAS_CONSTANT,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                ROWS_D,
                ROWS_DV,
            )
            num_keys = length.to(tl.float32)
        else:
            b_s, b_w, b_z, num_keys = load_state(p_state, i_s * num_heads + i_h, i_d, i_v, D, DV)
        p_q = at_head(p_q, stride_q, i_b, i_h, offset)
        p_do = at_head(p_do, stride_do, i_b, i_h, offset)
        p_dq = at_head(p_dq, stride_dq, i_b, i_h, offset)
        if p_factor is not None:
            p_factor += i_b * num_tokens + offset
        b_ds = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
        b_dws = tl.zeros([ROWS_DV, BLOCK_DV], tl.float32)
        b_dzs = tl.zeros([ROWS_D, BLOCK_D], tl.float32)
        for start in range(first, end, BLOCK_N):
            i_n = start + tl.arange(0, BLOCK_N)
            b_q = load_tile(p_q, stride_q, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
            b_do = load_tile(p_do, stride_do, i_n, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
            b_a, b_factor, b_inverse, b_scale, free = query_rows(
                b_q,
                b_z,
                num_keys,
                p_factor,
                scale,
                i_n,
                i_d,
                length,
                D,
                NORMALIZED,
                QK_NORM,
                FEATURE_MAP,
                HAS_CONSTANT,
                FREE_SINGLE_KEY,
            )
            b_u = dot_state(b_do, tl.trans(b_s))  # [BLOCK_N, BLOCK_D]
            b_dphi = b_u * b_scale[:, None]
            if NORMALIZED:
                b_numerator = b_factor * tl.sum(b_a.to(tl.float32) * b_u, axis=1)
                if HAS_CONSTANT:
                    b_numerator += tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
                b_e = tl.where(free, -b_numerator * b_scale * b_scale, 0.0 * b_numerator)
                b_dphi += b_e[:, None] * b_z[None, :]
                b_dzs += fold_rows(b_a.to(tl.float32) * (b_factor * b_e)[:, None], ROWS_D)
            if FREE_SINGLE_KEY:
                b_dphi = tl.where(num_keys == 1, 0.0, b_dphi)
            b_dq = features_backward(b_dphi, b_q, b_inverse, QK_NORM, FEATURE_MAP)
            store_tile(p_dq, stride_dq, b_dq, i_n, i_d, length, D)
            if HAS_CONSTANT:
                b_dws += fold_rows(b_do.to(tl.float32) * b_scale[:, None], ROWS_DV)
            b_scaled = b_do.to(tl.float32) * (b_factor * b_scale)[:, None]
            b_ds += dot(tl.trans(b_a), narrow(b_scaled, b_do.dtype))
        b_dw, b_dz = tl.sum(b_dws, axis=0), tl.sum(b_dzs, axis=0)

    if p_dk is None:
        i_row = i_part * num_heads + i_h
        store_state(p_dstate, i_row, b_ds, b_dw, b_dz, 0.0, i_d, i_v, D, DV)
    else:
        p_dk = at_head(p_dk, stride_dk, i_b, i_h, offset)
        p_dv = at_head(p_dv, stride_dv, i_b, i_h, offset)
        for start in range(first, end, BLOCK_N):
            i_n = start + tl.arange(0, BLOCK_N)
            b_k = load_tile(p_k, stride_k, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(p_v, stride_v, i_n, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
            b_a, b_factor, b_inverse = features(b_k, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
            b_dv = dot_state(b_a, b_ds) * b_factor[:, None] + b_dw[None, :]
            store_tile(p_dv, stride_dv, b_dv, i_n, i_v, length, DV)
            b_dphi = dot_state(b_v, tl.trans(b_ds)) + b_dz[None, :]
            b_dk = features_backward(b_dphi, b_k, b_inverse, QK_NORM, FEATURE_MAP)
            store_tile(p_dk, stride_dk, b_dk, i_n, i_d, length, D)

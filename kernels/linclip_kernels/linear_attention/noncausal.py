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

from linclip_kernels.linear_attention.split import Call, Launch
from linclip_kernels.linear_attention.tiles import (
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

__all__ = ["plan_backward", "plan_forward"]


def plan_forward(call: Call, out: Tensor, state: Tensor | None) -> list[Launch]:
    """The launches that fill ``out`` [B, N, H, Dv] and, if wanted, ``state`` [S, H, D+1, Dv+1]."""
    q, k, v, split = call.q, call.k, call.v, call.split
    arguments = {
        "p_q": q,
        "p_out": out,
        "stride_q": q.stride(),
        "stride_out": out.stride(),
        **call.arguments,
    }
    if call.is_whole:
        own = {"p_state": None, "p_save": state} | _key_arguments(k, v)
        return [Launch(_forward_kernel, split.grid, arguments | own, split.num_warps)]
    launches, state = _plan_state(call, state)
    given = {"p_state": state, "p_save": None} | _key_arguments(None, None)
    return [*launches, Launch(_forward_kernel, split.grid, arguments | given, split.num_warps)]


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
    q, k, v, split = call.q, call.k, call.v, call.split
    d_q, d_k, d_v = gradients
    common = call.arguments
    query_side = {
        "p_q": q,
        "p_do": grad,
        "p_dq": d_q,
        "stride_q": q.stride(),
        "stride_do": grad.stride(),
        "stride_dq": d_q.stride(),
    }
    key_side = _key_arguments(k, v) | {
        "p_dk": d_k,
        "p_dv": d_v,
        "stride_dk": d_k.stride(),
        "stride_dv": d_v.stride(),
    }
    no_query_side, no_key_side = dict.fromkeys(query_side), dict.fromkeys(key_side)

    def launch(**arguments: Any) -> Launch:
        return Launch(_backward_kernel, split.grid, arguments | common, split.num_warps)

    if call.is_whole and grad_state is None:
        whole = launch(**query_side, **key_side, p_state=state, p_dstate=None)
        return None, [whole]
    launches: list[Launch] = []
    if state is None:
        launches, state = _plan_state(call, None)
    parts = split.empty_parts()
    d_state = split.empty_states(split.num_sequences)
    launches += [
        launch(**query_side, **no_key_side, p_state=state, p_dstate=parts),
        combine_states(parts, split, start=grad_state, total=d_state),
        launch(**no_query_side, **key_side, p_state=state, p_dstate=d_state),
    ]
    return d_state, launches


def _key_arguments(k: Tensor | None, v: Tensor | None) -> dict[str, Any]:
    return {
        "p_k": k,
        "p_v": v,
        "stride_k": None if k is None else k.stride(),
        "stride_v": None if v is None else v.stride(),
    }


def _plan_state(call: Call, state: Tensor | None) -> tuple[list[Launch], Tensor]:
    split = call.split
    parts = split.empty_parts()
    state = split.empty_states(split.num_sequences) if state is None else state
    launches = [
        sum_states(call.k, call.v, None, parts, split, call.form),
        combine_states(parts, split, start=call.initial, total=state),
    ]
    return launches, state


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

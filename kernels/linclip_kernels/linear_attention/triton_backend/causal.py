# mypy: allow-untyped-defs
"""Causal linear attention in Triton: masked tiles within a part, a state for what lies outside it.

A part is short, and its scores are computed tile by tile. Where a sequence is one part, one launch
does it all. Otherwise every part first gets the state before it (forward) and after it (backward).
The derivation is in README.md beside this file.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend.partition import Call, Launch
from linclip_kernels.linear_attention.triton_backend.primitives import (
    LENGTHS,
    at_head,
    combine_states,
    dot,
    dot_state,
    features,
    features_backward,
    load_rows,
    load_state,
    load_tile,
    narrow,
    program_place,
    row_scale,
    rows_at_head,
    store_rows,
    store_tile,
    sum_states,
)

__all__ = ["plan_backward", "plan_forward"]


def plan_forward(call: Call, out: Tensor, state: Tensor | None) -> list[Launch]:
    """The launches that fill ``out`` [B, N, H, Dv] and, if wanted, ``state`` [S, H, D+1, Dv+1]."""
    q, k, v, split = call.q, call.k, call.v, call.split
    launches: list[Launch] = []
    before = None
    if not call.is_whole or state is not None:
        launches, before = _plan_before(call, state)
    arguments = {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_before": before,
        "p_out": out,
        "stride_q": q.stride(),
        "stride_k": k.stride(),
        "stride_v": v.stride(),
        "stride_out": out.stride(),
        **call.arguments,
    }
    return [*launches, Launch(_forward_kernel, split.grid, arguments, split.num_warps)]


def plan_backward(
    call: Call,
    _state: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, list[Launch]]:
    """The launches that fill dq, dk and dv, and the initial state's gradient if there is one."""
    q, k, v, split = call.q, call.k, call.v, call.split
    d_q, d_k, d_v = gradients
    shape = split.batch, split.heads, 2, split.num_tokens
    rows = torch.empty(shape, dtype=torch.float32, device=q.device)
    common = {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_do": grad,
        "p_rows": rows,
        "stride_q": q.stride(),
        "stride_k": k.stride(),
        "stride_v": v.stride(),
        "stride_do": grad.stride(),
        **call.arguments,
    }
    query_side: dict[str, Any] = {"p_dq": d_q, "stride_dq": d_q.stride(), "p_before": None}
    key_side: dict[str, Any] = {
        "p_dk": d_k,
        "p_dv": d_v,
        "stride_dk": d_k.stride(),
        "stride_dv": d_v.stride(),
        "p_after": None,
    }

    def launch(**arguments: Any) -> Launch:
        return Launch(_backward_kernel, split.grid, arguments | common, split.num_warps)

    if call.is_whole and grad_state is None:
        return None, [launch(**query_side, **key_side)]
    no_query_side, no_key_side = dict.fromkeys(query_side), dict.fromkeys(key_side)
    launches, query_side["p_before"] = _plan_before(call, None)
    after = split.empty_parts()
    d_initial = None if call.initial is None else split.empty_states(split.num_sequences)
    key_side["p_after"] = after
    launches += [
        launch(**query_side, **no_key_side),
        sum_states(q, grad, rows, after, split, call.form),
        combine_states(after, split, start=grad_state, before=after, total=d_initial, reverse=True),
        launch(**no_query_side, **key_side),
    ]
    return d_initial, launches


def _plan_before(call: Call, total: Tensor | None) -> tuple[list[Launch], Tensor]:
    split = call.split
    before = split.empty_parts()
    launches = [
        sum_states(call.k, call.v, None, before, split, call.form),
        combine_states(before, split, start=call.initial, before=before, total=total),
    ]
    return launches, before


@triton.jit
def masked_dot(b_a, b_x, i_rows, i_first, UPPER: tl.constexpr):
    """a @ x, where zeros of a beyond the diagonal keep out NaN and infinity too.

    Rows of x stand for tokens i_first, i_first + 1, ...; a row of the product for token i_rows,
    which sees tokens up to itself (UPPER: from itself on).
    """
    product = dot(narrow(b_a, b_x.dtype), b_x)
    check = tl.sum(tl.sum(product, axis=1), axis=0)
    if check - check != 0:
        # Token by token, as by the definition.
        product = tl.zeros_like(product)
        i = tl.arange(0, b_x.shape[0])
        for step in range(b_x.shape[0]):
            column = tl.sum(tl.where(i[None, :] == step, b_a, 0.0), axis=1)
            row = tl.sum(tl.where(i[:, None] == step, b_x.to(tl.float32), 0.0), axis=0)
            token = i_first + step
            seen = i_rows <= token if UPPER else i_rows >= token
            product += tl.where(seen[:, None], column[:, None] * row[None, :], 0.0)
    return product


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_before,
    p_factor,
    p_out,
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
    i_part, _i_s, i_h, i_b, offset, length, first, end = program_place(
        p_table, num_tokens, num_heads, num_parts, part
    )
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q = at_head(p_q, stride_q, i_b, i_h, offset)
    p_k = at_head(p_k, stride_k, i_b, i_h, offset)
    p_v = at_head(p_v, stride_v, i_b, i_h, offset)
    p_out = at_head(p_out, stride_out, i_b, i_h, offset)
    if p_factor is not None:
        p_factor += i_b * num_tokens + offset
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
        b_aq, b_fq, _inverse = features(b_q, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
        if FREE_SINGLE_KEY:
            b_fq = tl.where(i_n == 0, 0.0, b_fq)
        b_out = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        b_denominator = tl.zeros([BLOCK_N], tl.float32)
        b_num_keys = (i_n - first + 1).to(tl.float32)
        if p_before is not None:
            b_s, b_w, b_z, num_keys = load_state(
                p_before, i_part * num_heads + i_h, i_d, i_v, D, DV
            )
            b_num_keys += num_keys
            b_out = dot_state(b_aq, b_s) * b_fq[:, None]
            b_denominator = b_fq * tl.sum(b_aq.to(tl.float32) * b_z[None, :], axis=1)
            if HAS_CONSTANT:
                b_out += b_w[None, :]
                b_denominator += num_keys
        for key_start in range(first, start + BLOCK_N, BLOCK_N):
            i_m = key_start + tl.arange(0, BLOCK_N)
            b_k = load_tile(p_k, stride_k, i_m, i_d, length, D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(p_v, stride_v, i_m, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
            b_ak, b_fk, _inverse = features(b_k, i_m, i_d, length, D, QK_NORM, FEATURE_MAP)
            b_a = dot(b_aq, tl.trans(b_ak)) * b_fq[:, None] * b_fk[None, :]  # the scores
            if HAS_CONSTANT:
                b_a += 1.0
            b_a = tl.where(i_n[:, None] >= i_m[None, :], b_a, 0.0)
            b_denominator += tl.sum(b_a, axis=1)
            b_out += masked_dot(b_a, b_v, i_n, key_start, False)
        b_scale, _free = row_scale(
            b_denominator, b_num_keys, p_factor, i_n, length, scale, NORMALIZED
        )
        store_tile(p_out, stride_out, b_out * b_scale[:, None], i_n, i_v, length, DV)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_before,
    p_after,
    p_factor,
    p_rows,
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
    """Without p_dk the side of the queries alone, without p_dq that of the keys.

    The side of the queries leaves scale and e of every row to that of the keys.
    """
    i_part, _i_s, i_h, i_b, offset, length, first, end = program_place(
        p_table, num_tokens, num_heads, num_parts, part
    )
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q = at_head(p_q, stride_q, i_b, i_h, offset)
    p_k = at_head(p_k, stride_k, i_b, i_h, offset)
    p_v = at_head(p_v, stride_v, i_b, i_h, offset)
    p_do = at_head(p_do, stride_do, i_b, i_h, offset)
    p_rows = rows_at_head(p_rows, i_b, i_h, offset, num_tokens, num_heads)

    if p_dq is not None:
        p_dq = at_head(p_dq, stride_dq, i_b, i_h, offset)
        if p_factor is not None:
            p_factor += i_b * num_tokens + offset
        for start in range(first, end, BLOCK_N):
            i_n = start + tl.arange(0, BLOCK_N)
            b_do = load_tile(p_do, stride_do, i_n, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
            # Over the keys in view: sum of phi(k) (do.v), of phi(k), and of do.v.
            b_u = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            b_zs = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            b_sum = tl.zeros([BLOCK_N], tl.float32)
            b_num_keys = (i_n - first + 1).to(tl.float32)
            if p_before is not None:
                b_s, b_w, b_z, num_keys = load_state(
                    p_before, i_part * num_heads + i_h, i_d, i_v, D, DV
                )
                b_num_keys += num_keys
                b_u = dot_state(b_do, tl.trans(b_s))
                if NORMALIZED:
                    b_zs += b_z[None, :]
                    b_sum = tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
            for key_start in range(first, start + BLOCK_N, BLOCK_N):
                i_m = key_start + tl.arange(0, BLOCK_N)
                b_k = load_tile(p_k, stride_k, i_m, i_d, length, D)  # [BLOCK_N, BLOCK_D]
                b_v = load_tile(p_v, stride_v, i_m, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
                b_ak, b_fk, _inverse = features(b_k, i_m, i_d, length, D, QK_NORM, FEATURE_MAP)
                seen = i_n[:, None] >= i_m[None, :]
                b_p = tl.where(seen, dot(b_do, tl.trans(b_v)), 0.0)  # [BLOCK_N, BLOCK_N]
                # A factor that is NaN or infinite must not reach earlier rows through a zero.
                b_p_scaled = tl.where(seen, b_p * b_fk[None, :], 0.0)
                b_u += masked_dot(b_p_scaled, b_ak, i_n, key_start, False)
                if NORMALIZED:
                    b_sum += tl.sum(b_p, axis=1)
                    b_factors = tl.where(seen, b_fk[None, :], 0.0)
                    b_zs += masked_dot(b_factors, b_ak, i_n, key_start, False)
            b_q = load_tile(p_q, stride_q, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
            b_aq, b_fq, b_inverse = features(b_q, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
            if FREE_SINGLE_KEY:
                b_fq = tl.where(i_n == 0, 0.0, b_fq)
            b_denominator = b_fq
            if NORMALIZED:
                b_denominator = b_fq * tl.sum(b_aq.to(tl.float32) * b_zs, axis=1)
                if HAS_CONSTANT:
                    b_denominator += b_num_keys
            b_scale, free = row_scale(
                b_denominator, b_num_keys, p_factor, i_n, length, scale, NORMALIZED
            )
            b_e = b_scale * 0.0
            b_dphi = b_u * b_scale[:, None]
            if NORMALIZED:
                b_numerator = b_fq * tl.sum(b_aq.to(tl.float32) * b_u, axis=1)
                if HAS_CONSTANT:
                    b_numerator += b_sum
                b_e = tl.where(free, -b_numerator * b_scale * b_scale, 0.0 * b_numerator)
                b_dphi += b_e[:, None] * b_zs
            if FREE_SINGLE_KEY:
                b_dphi = tl.where((i_n == 0)[:, None], 0.0, b_dphi)
            store_rows(p_rows, num_tokens, b_scale, b_e, i_n, length)
            b_dq = features_backward(b_dphi, b_q, b_inverse, QK_NORM, FEATURE_MAP)
            store_tile(p_dq, stride_dq, b_dq, i_n, i_d, length, D)

    if p_dk is not None:
        if p_dq is not None:
            tl.debug_barrier()  # the rows' scale and e are written by other threads
        p_dk = at_head(p_dk, stride_dk, i_b, i_h, offset)
        p_dv = at_head(p_dv, stride_dv, i_b, i_h, offset)
        for key_start in range(first, end, BLOCK_N):
            i_m = key_start + tl.arange(0, BLOCK_N)
            b_k = load_tile(p_k, stride_k, i_m, i_d, length, D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(p_v, stride_v, i_m, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
            b_ak, b_fk, b_inverse = features(b_k, i_m, i_d, length, D, QK_NORM, FEATURE_MAP)
            b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            b_dphi = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            if p_after is not None:
                b_ds, b_dw, b_dz, _none = load_state(
                    p_after, i_part * num_heads + i_h, i_d, i_v, D, DV
                )
                b_dv = dot_state(b_ak, b_ds) * b_fk[:, None] + b_dw[None, :]
                b_dphi = dot_state(b_v, tl.trans(b_ds)) + b_dz[None, :]
            for start in range(key_start, end, BLOCK_N):
                i_n = start + tl.arange(0, BLOCK_N)
                b_q = load_tile(p_q, stride_q, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
                b_do = load_tile(p_do, stride_do, i_n, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
                b_aq, b_fq, _inverse = features(b_q, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
                if FREE_SINGLE_KEY:
                    b_fq = tl.where(i_n == 0, 0.0, b_fq)
                b_scale, b_e = load_rows(p_rows, num_tokens, i_n, length)
                seen = i_m[:, None] <= i_n[None, :]  # transposed: a row for every key
                b_a = dot(b_ak, tl.trans(b_aq)) * b_fk[:, None] * b_fq[None, :]
                if HAS_CONSTANT:
                    b_a += 1.0
                b_a = tl.where(seen, b_a * b_scale[None, :], 0.0)
                b_dv += masked_dot(b_a, b_do, i_m, start, True)
                b_da = dot(b_v, tl.trans(b_do)) * b_scale[None, :] + b_e[None, :]
                b_da = tl.where(seen, b_da * b_fq[None, :], 0.0)
                b_dphi += masked_dot(b_da, b_aq, i_m, start, True)
            store_tile(p_dv, stride_dv, b_dv, i_m, i_v, length, DV)
            b_dk = features_backward(b_dphi, b_k, b_inverse, QK_NORM, FEATURE_MAP)
            store_tile(p_dk, stride_dk, b_dk, i_m, i_d, length, D)

# mypy: allow-untyped-defs
# ruff: noqa: RET505 (Triton needs the else where a branch is chosen at compile time)
"""Causal linear attention in Triton: masked tiles, and a state that runs over the tiles of a part.

A sequence of several parts first gets the state before each part (forward) or after it (backward),
so that the parts run at the same time. The derivation is in README.md beside this file.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention.eager import Form
from linclip_kernels.linear_attention.tiles import (
    Launch,
    Split,
    combine_state,
    dot,
    dot_state,
    inverse_denominator,
    inverse_norm,
    inverse_norm_backward,
    load_rows,
    load_state,
    load_tile,
    program_place,
    split_tokens,
    store_rows,
    store_tile,
    sum_state,
)

__all__ = ["plan_backward", "plan_forward"]


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, form: Form
) -> tuple[Tensor, Tensor | None, list[Launch]]:
    """Allocate the output [B, N, H, Dv] and the states before the parts; list the launches."""
    split = split_tokens(q, v, form)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launches: list[Launch] = []
    before = None
    if split.num_parts > 1:
        before = split.state_like(q)
        launches.append(sum_state(k, v, None, before, split, form))
        launches.append(combine_state(before, before, prefix=True))
    arguments = {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_before": out if before is None else before,
        "p_out": out,
        "stride_q": q.stride(),
        "stride_k": k.stride(),
        "stride_v": v.stride(),
        **_factor_arguments(q, form),
        **_common_arguments(split, form),
    }
    launches.append(Launch(_forward_kernel, split.grid, arguments, split.num_warps))
    return out, before, launches


def plan_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, before: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """Allocate dq, dk [value blocks, B, N, H, D] and dv [B, N, H, Dv]; list the launches."""
    split = split_tokens(q, v, form)
    d_q, d_k = split.gradient_like(q), split.gradient_like(k)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (2, split.num_value_blocks, split.batch * split.heads, split.num_tokens)
    rows = torch.empty(shape, dtype=torch.float32, device=q.device)
    inputs = {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_do": grad,
        "p_rows": rows,
        "stride_q": q.stride(),
        "stride_k": k.stride(),
        "stride_v": v.stride(),
        "stride_do": grad.stride(),
        **_common_arguments(split, form),
    }
    query_side = {
        "p_before": rows if before is None else before,
        "p_dq": d_q,
        **_factor_arguments(q, form),
        **inputs,
    }
    launches = [Launch(_backward_q_kernel, split.grid, query_side, split.num_warps)]
    after = rows
    if split.num_parts > 1:
        after = split.state_like(q)
        launches.append(sum_state(q, grad, rows, after, split, form))
        launches.append(combine_state(after, after, prefix=True, reverse=True))
    key_side = {"p_after": after, "p_dk": d_k, "p_dv": d_v, **inputs}
    launches.append(Launch(_backward_kv_kernel, split.grid, key_side, split.num_warps))
    return d_q, d_k, d_v, launches


def _common_arguments(split: Split, form: Form) -> dict[str, Any]:
    several = split.num_parts > 1
    return {**split.arguments(form), "NORMALIZED": form.normalized, "SEVERAL_PARTS": several}


def _factor_arguments(q: Tensor, form: Form) -> dict[str, Any]:
    """Scale of the unnormalised form; its power of the row index comes from a table [N]."""
    has_length_factor = form.length_exponent != 0 and not form.normalized
    table = q
    if has_length_factor:
        index = torch.arange(1, q.shape[1] + 1, dtype=torch.float32, device=q.device)
        table = index**-form.length_exponent
    return {
        "p_length_factor": table,
        "scale": float(form.score_scale),
        "HAS_LENGTH_FACTOR": has_length_factor,
    }


@triton.jit
def masked_scores(b_q, b_k, b_q_inverse, b_k_inverse, i_n, NORMALIZED: tl.constexpr):
    """1 + q.k of one tile, zero above the diagonal: [BLOCK_N, BLOCK_N]."""
    b_a = 1.0 + dot(b_q, tl.trans(b_k)) * b_q_inverse[:, None] * b_k_inverse[None, :]
    b_a = tl.where(i_n[:, None] >= i_n[None, :], b_a, 0.0)
    if NORMALIZED:
        # Row 1 has one key: its weight is 1, in the limit too.
        b_a = tl.where((i_n[:, None] == 0) & (i_n[None, :] == 0), 1.0, b_a)
    return b_a


@triton.jit
def causal_row_scale(
    b_a,
    b_q_hat,
    b_z,
    scale,
    p_length_factor,
    start,
    i_n,
    num_tokens,
    NORMALIZED: tl.constexpr,
    HAS_LENGTH_FACTOR: tl.constexpr,
):
    """Factor of every row's numerator, and where no clamp holds its denominator."""
    if NORMALIZED:
        denominator = tl.sum(b_a, axis=1) + (start + tl.sum(b_q_hat * b_z[None, :], axis=1))
        return inverse_denominator(denominator, i_n + 1)
    elif HAS_LENGTH_FACTOR:
        factor = tl.load(p_length_factor + i_n, mask=i_n < num_tokens, other=0.0)
        return factor * scale, i_n >= 0
    else:
        return (i_n * 0).to(tl.float32) + scale, i_n >= 0


@triton.jit
def state_at_edge(
    p_state,
    i_row,
    i_d,
    i_v,
    SEVERAL_PARTS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The state outside this part: zero if there is no other part."""
    if SEVERAL_PARTS:
        return load_state(p_state, i_row, i_d, i_v, D, DV, BLOCK_DV)
    else:
        b_s = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
        return b_s, tl.zeros([BLOCK_DV], tl.float32), tl.zeros([BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_before,
    p_length_factor,
    p_out,
    stride_q,
    stride_k,
    stride_v,
    scale,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_LENGTH_FACTOR: tl.constexpr,
    SEVERAL_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    i_part, i_bh, num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_s, b_w, b_z = state_at_edge(
        p_before, i_part * num_bh + i_bh, i_d, i_v, SEVERAL_PARTS, D, DV, BLOCK_D, BLOCK_DV
    )
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_k = load_tile(p_k, stride_k, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(p_v, stride_v, i_b, i_h, i_n, i_v, num_tokens, DV)  # [BLOCK_N, BLOCK_DV]
        b_q_inverse, b_k_inverse = inverse_norm(b_q, QK_NORM), inverse_norm(b_k, QK_NORM)
        b_q_hat = b_q.to(tl.float32) * b_q_inverse[:, None]
        b_k_hat = b_k.to(tl.float32) * b_k_inverse[:, None]
        b_a = masked_scores(b_q, b_k, b_q_inverse, b_k_inverse, i_n, NORMALIZED)
        b_scale, _free = causal_row_scale(
            b_a,
            b_q_hat,
            b_z,
            scale,
            p_length_factor,
            start,
            i_n,
            num_tokens,
            NORMALIZED,
            HAS_LENGTH_FACTOR,
        )
        b_out = dot(b_a.to(b_v.dtype), b_v) + b_w[None, :]  # [BLOCK_N, BLOCK_DV]
        b_out += dot_state(b_q, b_s) * b_q_inverse[:, None]
        store_tile(p_out, b_out * b_scale[:, None], i_b, i_h, i_n, i_v, num_tokens, num_heads, DV)
        b_w += tl.sum(b_v.to(tl.float32), axis=0)
        b_z += tl.sum(b_k_hat, axis=0)
        b_s += dot(tl.trans(b_k_hat.to(b_v.dtype)), b_v)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_before,
    p_length_factor,
    p_rows,
    p_dq,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    scale,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_LENGTH_FACTOR: tl.constexpr,
    SEVERAL_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    i_part, i_bh, num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    p_dq += i_block * num_bh * num_tokens * D
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_s, b_w, b_z = state_at_edge(
        p_before, i_part * num_bh + i_bh, i_d, i_v, SEVERAL_PARTS, D, DV, BLOCK_D, BLOCK_DV
    )
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_k = load_tile(p_k, stride_k, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(p_v, stride_v, i_b, i_h, i_n, i_v, num_tokens, DV)  # [BLOCK_N, BLOCK_DV]
        b_do = load_tile(p_do, stride_do, i_b, i_h, i_n, i_v, num_tokens, DV)  # [.., BLOCK_DV]
        b_q_inverse, b_k_inverse = inverse_norm(b_q, QK_NORM), inverse_norm(b_k, QK_NORM)
        b_q_hat = b_q.to(tl.float32) * b_q_inverse[:, None]
        b_k_hat = b_k.to(tl.float32) * b_k_inverse[:, None]
        b_a = masked_scores(b_q, b_k, b_q_inverse, b_k_inverse, i_n, NORMALIZED)
        b_scale, free = causal_row_scale(
            b_a,
            b_q_hat,
            b_z,
            scale,
            p_length_factor,
            start,
            i_n,
            num_tokens,
            NORMALIZED,
            HAS_LENGTH_FACTOR,
        )
        b_da = dot(b_do, tl.trans(b_v))  # do.v, [BLOCK_N, BLOCK_N]
        b_u = dot_state(b_do, tl.trans(b_s))  # [BLOCK_N, BLOCK_D]
        b_e = b_scale * 0.0
        if NORMALIZED:
            b_numerator = tl.sum(b_a * b_da, axis=1) + tl.sum(b_q_hat * b_u, axis=1)
            b_numerator += tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
            b_e = tl.where(free, -b_numerator * b_scale * b_scale, 0.0)
        store_rows(p_rows, b_scale, b_e, i_block, i_bh, num_bh, i_n, num_tokens)
        b_da = b_da * b_scale[:, None] + b_e[:, None]
        b_da = tl.where(i_n[:, None] >= i_n[None, :], b_da, 0.0) * b_k_inverse[None, :]
        b_dq_hat = dot(b_da.to(b_k.dtype), b_k) + b_u * b_scale[:, None]
        b_dq_hat += b_e[:, None] * b_z[None, :]
        b_dq = inverse_norm_backward(b_dq_hat, b_q, b_q_inverse, QK_NORM)
        store_tile(p_dq, b_dq, i_b, i_h, i_n, i_d, num_tokens, num_heads, D)
        b_w += tl.sum(b_v.to(tl.float32), axis=0)
        b_z += tl.sum(b_k_hat, axis=0)
        b_s += dot(tl.trans(b_k_hat.to(b_v.dtype)), b_v)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_rows,
    p_after,
    p_dk,
    p_dv,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SEVERAL_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    i_part, i_bh, num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    p_dk += i_block * num_bh * num_tokens * D
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_ds, b_dw, b_dz = state_at_edge(
        p_after, i_part * num_bh + i_bh, i_d, i_v, SEVERAL_PARTS, D, DV, BLOCK_D, BLOCK_DV
    )
    # After the last part the state is this value block's own; the sum over all value blocks in the
    # loaded z would be counted once per block.
    if SEVERAL_PARTS:
        b_dz = tl.where(i_block == 0, b_dz, 0.0)
    num_tiles = tl.cdiv(end - first, BLOCK_N)
    for step in range(num_tiles):
        i_n = first + (num_tiles - 1 - step) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_k = load_tile(p_k, stride_k, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(p_v, stride_v, i_b, i_h, i_n, i_v, num_tokens, DV)  # [BLOCK_N, BLOCK_DV]
        b_do = load_tile(p_do, stride_do, i_b, i_h, i_n, i_v, num_tokens, DV)  # [.., BLOCK_DV]
        b_scale, b_e = load_rows(p_rows, i_block, i_bh, num_bh, i_n, num_tokens)
        b_q_inverse, b_k_inverse = inverse_norm(b_q, QK_NORM), inverse_norm(b_k, QK_NORM)
        b_q_hat = b_q.to(tl.float32) * b_q_inverse[:, None]
        b_a = masked_scores(b_q, b_k, b_q_inverse, b_k_inverse, i_n, NORMALIZED)

        b_a_scaled = (b_a * b_scale[:, None]).to(b_do.dtype)
        b_dv = dot(tl.trans(b_a_scaled), b_do) + b_dw[None, :]  # [BLOCK_N, BLOCK_DV]
        b_dv += dot_state(b_k, b_ds) * b_k_inverse[:, None]
        store_tile(p_dv, b_dv, i_b, i_h, i_n, i_v, num_tokens, num_heads, DV)

        b_da = dot(b_do, tl.trans(b_v)) * b_scale[:, None] + b_e[:, None]
        b_da = tl.where(i_n[:, None] >= i_n[None, :], b_da, 0.0) * b_q_inverse[:, None]
        b_dk_hat = dot(tl.trans(b_da.to(b_q.dtype)), b_q) + b_dz[None, :]  # [BLOCK_N, BLOCK_D]
        b_dk_hat += dot_state(b_v, tl.trans(b_ds))
        b_dk = inverse_norm_backward(b_dk_hat, b_k, b_k_inverse, QK_NORM)
        store_tile(p_dk, b_dk, i_b, i_h, i_n, i_d, num_tokens, num_heads, D)

        b_dw += tl.sum(b_do.to(tl.float32) * b_scale[:, None], axis=0)
        b_dz += tl.sum(b_q_hat * b_e[:, None], axis=0)
        b_ds += dot(tl.trans((b_q_hat * b_scale[:, None]).to(b_do.dtype)), b_do)

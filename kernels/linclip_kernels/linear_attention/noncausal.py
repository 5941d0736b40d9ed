# mypy: allow-untyped-defs
# ruff: noqa: RET505 (Triton needs the else where a branch is chosen at compile time)
"""Bidirectional linear attention in Triton: partial states, their sum, then every row by itself.

Forward reads q, k, v and writes o; backward reads q, do, then k, v and writes dq, dk, dv. Nothing
else of their size is moved. The derivation is in README.md beside this file.
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
    load_state,
    load_tile,
    program_place,
    split_tokens,
    store_state,
    store_tile,
    sum_state,
)

__all__ = ["plan_backward", "plan_forward"]


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, form: Form
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Allocate the output [B, N, H, Dv] and the state [1, B * H, state_size]; list the launches."""
    split = split_tokens(q, v, form)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    parts = split.state_like(q)
    launches = [sum_state(k, v, None, parts, split, form)]
    state = _add_total(parts, launches)
    arguments = {
        "p_q": q,
        "p_state": state,
        "p_out": out,
        "stride_q": q.stride(),
        **_arguments(split, form),
    }
    launches.append(Launch(_apply_kernel, split.grid, arguments, split.num_warps))
    return out, state, launches


def plan_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, state: Tensor, form: Form
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """Allocate dq, dk [value blocks, B, N, H, D] and dv [B, N, H, Dv]; list the launches."""
    split = split_tokens(q, v, form)
    d_q, d_k = split.gradient_like(q), split.gradient_like(k)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_parts = split.state_like(q)
    query_side = {
        "p_q": q,
        "p_do": grad,
        "p_state": state,
        "p_dq": d_q,
        "p_dstate": d_parts,
        "stride_q": q.stride(),
        "stride_do": grad.stride(),
        **_arguments(split, form),
    }
    launches = [Launch(_backward_q_kernel, split.grid, query_side, split.num_warps)]
    d_state = _add_total(d_parts, launches)
    key_side = {
        "p_k": k,
        "p_v": v,
        "p_dstate": d_state,
        "p_dk": d_k,
        "p_dv": d_v,
        "stride_k": k.stride(),
        "stride_v": v.stride(),
        **split.arguments(form),
    }
    launches.append(Launch(_backward_kv_kernel, split.grid, key_side, split.num_warps))
    return d_q, d_k, d_v, launches


def _arguments(split: Split, form: Form) -> dict[str, Any]:
    scale = form.score_scale * split.num_tokens**-form.length_exponent
    return {**split.arguments(form), "scale": scale, "NORMALIZED": form.normalized}


def _add_total(parts: Tensor, launches: list[Launch]) -> Tensor:
    if len(parts) == 1:
        return parts
    total = torch.empty_like(parts[:1])
    launches.append(combine_state(parts, total, prefix=False))
    return total


@triton.jit
def row_scale(b_q, b_q_inverse, b_z, scale, num_tokens, NORMALIZED: tl.constexpr):
    """Factor of every row's numerator, and where no clamp holds its denominator."""
    if NORMALIZED:
        denominator = num_tokens + b_q_inverse * tl.sum(b_q.to(tl.float32) * b_z[None, :], axis=1)
        return inverse_denominator(denominator, num_tokens)
    else:
        return b_q_inverse * 0.0 + scale, b_q_inverse == b_q_inverse


@triton.jit(do_not_specialize=["num_tokens"])
def _apply_kernel(
    p_q,
    p_state,
    p_out,
    stride_q,
    scale,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    _i_part, i_bh, _num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_s, b_w, b_z = load_state(p_state, i_bh, i_d, i_v, D, DV, BLOCK_DV)
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_q_inverse = inverse_norm(b_q, QK_NORM)
        b_scale, _free = row_scale(b_q, b_q_inverse, b_z, scale, num_tokens, NORMALIZED)
        b_out = b_w[None, :] + dot_state(b_q, b_s) * b_q_inverse[:, None]  # [BLOCK_N, BLOCK_DV]
        store_tile(p_out, b_out * b_scale[:, None], i_b, i_h, i_n, i_v, num_tokens, num_heads, DV)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_q_kernel(
    p_q,
    p_do,
    p_state,
    p_dq,
    p_dstate,
    stride_q,
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
    b_s, b_w, b_z = load_state(p_state, i_bh, i_d, i_v, D, DV, BLOCK_DV)
    b_ds = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    b_dw = tl.zeros([BLOCK_DV], tl.float32)
    b_dz = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_q = load_tile(p_q, stride_q, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_do = load_tile(p_do, stride_do, i_b, i_h, i_n, i_v, num_tokens, DV)  # [.., BLOCK_DV]
        b_q_inverse = inverse_norm(b_q, QK_NORM)
        b_q_hat = b_q.to(tl.float32) * b_q_inverse[:, None]
        b_scale, free = row_scale(b_q, b_q_inverse, b_z, scale, num_tokens, NORMALIZED)
        b_u = dot_state(b_do, tl.trans(b_s))  # [BLOCK_N, BLOCK_D]
        b_dq_hat = b_u * b_scale[:, None]
        if NORMALIZED:
            b_numerator = tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
            b_numerator += tl.sum(b_q_hat * b_u, axis=1)
            b_e = tl.where(free, -b_numerator * b_scale * b_scale, 0.0)
            b_dq_hat += b_e[:, None] * b_z[None, :]
            b_dz += tl.sum(b_q_hat * b_e[:, None], axis=0)
        b_dq = inverse_norm_backward(b_dq_hat, b_q, b_q_inverse, QK_NORM)
        store_tile(p_dq, b_dq, i_b, i_h, i_n, i_d, num_tokens, num_heads, D)
        b_dw += tl.sum(b_do.to(tl.float32) * b_scale[:, None], axis=0)
        b_ds += dot(tl.trans((b_q_hat * b_scale[:, None]).to(b_do.dtype)), b_do)
    store_state(p_dstate, i_part * num_bh + i_bh, b_ds, b_dw, b_dz, i_d, i_v, D, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kv_kernel(
    p_k,
    p_v,
    p_dstate,
    p_dk,
    p_dv,
    stride_k,
    stride_v,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    _i_part, i_bh, num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    p_dk += i_block * num_bh * num_tokens * D
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_ds, b_dw, b_dz = load_state(p_dstate, i_bh, i_d, i_v, D, DV, BLOCK_DV)
    b_dz = tl.where(i_block == 0, b_dz, 0.0)  # the first value block's dk carries all of dz
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_k = load_tile(p_k, stride_k, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(p_v, stride_v, i_b, i_h, i_n, i_v, num_tokens, DV)  # [BLOCK_N, BLOCK_DV]
        b_k_inverse = inverse_norm(b_k, QK_NORM)
        b_dv = b_dw[None, :] + dot_state(b_k, b_ds) * b_k_inverse[:, None]
        store_tile(p_dv, b_dv, i_b, i_h, i_n, i_v, num_tokens, num_heads, DV)
        b_dk_hat = dot_state(b_v, tl.trans(b_ds)) + b_dz[None, :]
        b_dk = inverse_norm_backward(b_dk_hat, b_k, b_k_inverse, QK_NORM)
        store_tile(p_dk, b_dk, i_b, i_h, i_n, i_d, num_tokens, num_heads, D)

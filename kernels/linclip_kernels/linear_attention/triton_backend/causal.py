# mypy: allow-untyped-defs
"""Causal linear attention in Triton: masked tiles within a part, a state for all that precedes it.

A part is short, and its scores are computed tile by tile. Where a sequence is one part, one launch
computes everything. Otherwise every part first gets the state before it (forward) and after it
(backward). The derivation is in linear_attention/README.md.
"""

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
    store_rows,
    store_tile,
    sum_states,
    views,
)

__all__ = ["plan_backward", "plan_forward"]


def plan_forward(call: Call, out: Tensor, state: Tensor | None) -> list[Launch]:
    """Return the launches that fill ``out`` and, if given, ``state``.

    Args:
        call: The inputs.
        out: [B, N, H, Dv].
        state: [S, H, D + 1, Dv + 1].
    """
    launches: list[Launch] = []
    before = None
    if not call.is_whole or state is not None:
        launches, before = _plan_before(call, state)
    tensors = views(q=call.q, k=call.k, v=call.v, out=out)
    arguments = tensors | {"p_before": before} | call.arguments
    return [*launches, call.partition.launch(_forward_kernel, arguments)]


def plan_backward(
    call: Call,
    _state: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, list[Launch]]:
    """Return the gradient of the initial state, if there is one, and the launches that fill all.

    Args:
        call: The inputs.
        grad: The gradient of o, [B, N, H, Dv].
        grad_state: The gradient of the state, if there is one.
        gradients: dq and dk [B, N, H, D] and dv [B, N, H, Dv], to be filled.
    """
    assert call.q is not None
    partition, (d_q, d_k, d_v) = call.partition, gradients
    shape = partition.batch, partition.heads, 2, partition.num_tokens
    rows = torch.empty(shape, dtype=torch.float32, device=grad.device)

    def launch(
        d_q: Tensor | None,
        d_k: Tensor | None,
        d_v: Tensor | None,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Launch:
        tensors = views(q=call.q, k=call.k, v=call.v, do=grad, dq=d_q, dk=d_k, dv=d_v)
        states = {"p_before": before, "p_after": after, "p_rows": rows}
        return partition.launch(_backward_kernel, tensors | states | call.arguments)

    if call.is_whole and grad_state is None:
        return None, [launch(d_q, d_k, d_v)]
    launches, before = _plan_before(call, None)
    after = partition.empty_parts()
    d_initial = None if call.initial is None else partition.empty_states(partition.num_sequences)
    launches += [
        launch(d_q, None, None, before=before),
        sum_states(call.q, grad, rows, after, partition),
        combine_states(
            after, partition, start=grad_state, before=after, total=d_initial, reverse=True
        ),
        launch(None, d_k, d_v, after=after),
    ]
    return d_initial, launches


def _plan_before(call: Call, total: Tensor | None) -> tuple[list[Launch], Tensor]:
    """Return the launches that sum the state before every part, and the tensor they fill."""
    assert call.k is not None
    assert call.v is not None
    before = call.partition.empty_parts()
    launches = [
        sum_states(call.k, call.v, None, before, call.partition),
        combine_states(before, call.partition, start=call.initial, before=before, total=total),
    ]
    return launches, before


@triton.jit
def masked_dot(b_a, b_x, i_rows, i_first, UPPER: tl.constexpr, META: tl.constexpr):
    """a @ x, where zeros of a beyond the diagonal keep out NaN and infinity too.

    Rows of x stand for tokens i_first, i_first + 1, ...; a row of the product for token i_rows,
    which sees tokens up to itself (UPPER: from itself on).
    """
    product = dot(narrow(b_a, b_x.dtype), b_x, META)
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


@triton.jit
def query_features(b_q, i_n, place, META: tl.constexpr):
    """Return the features of q as (a, factor, inverse norm); the first row sees a single key."""
    b_a, b_factor, b_inverse = features(b_q, i_n, place, META)
    if META.FIX_SINGLE_KEY:
        b_factor = tl.where(i_n == 0, 0.0, b_factor)
    return b_a, b_factor, b_inverse


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q, k, v, out, p_before, factor, schedule, num_tokens, num_parts, part, META: tl.constexpr
):
    place = program_place(schedule, num_tokens, num_parts, part)
    q, k, v, out = at_head(q, place), at_head(k, place), at_head(v, place), at_head(out, place)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_q = load_tile(q, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_aq, b_fq, _inverse = query_features(b_q, i_n, place, META)
        b_out = tl.full([META.BLOCK_N, META.BLOCK_DV], 0.0, tl.float32)
        b_denominator = tl.full([META.BLOCK_N], 0.0, tl.float32)
        b_num_keys = (i_n - place.first + 1).to(tl.float32)
        if p_before is not None:
            b_s, b_w, b_z, num_keys = load_state(p_before, place.i_part, place, META)
            b_num_keys += num_keys
            b_out = dot_state(b_aq, b_s, META) * b_fq[:, None]
            b_denominator = b_fq * tl.sum(b_aq.to(tl.float32) * b_z[None, :], axis=1)
            if META.HAS_CONSTANT:
                b_out += b_w[None, :]
                b_denominator += num_keys
        for key_start in range(place.first, start + META.BLOCK_N, META.BLOCK_N):
            i_m = key_start + tl.arange(0, META.BLOCK_N)
            b_k = load_tile(k, i_m, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(v, i_m, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_ak, b_fk, _inverse = features(b_k, i_m, place, META)
            b_a = dot(b_aq, tl.trans(b_ak), META) * b_fq[:, None] * b_fk[None, :]  # the scores
            if META.HAS_CONSTANT:
                b_a += 1.0
            b_a = tl.where(i_n[:, None] >= i_m[None, :], b_a, 0.0)
            b_denominator += tl.sum(b_a, axis=1)
            b_out += masked_dot(b_a, b_v, i_n, key_start, False, META)
        b_scale, _unclamped = row_scale(b_denominator, b_num_keys, factor, i_n, place, META)
        store_tile(out, b_out * b_scale[:, None], i_n, place, META.DV, META.BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_kernel(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    p_before,
    p_after,
    p_rows,
    factor,
    schedule,
    num_tokens,
    num_parts,
    part,
    META: tl.constexpr,
):
    """Compute both sides; without dk the side of the queries alone, without dq that of the keys.

    The side of the queries writes scale and e of every row, which that of the keys reads.
    """
    place = program_place(schedule, num_tokens, num_parts, part)
    q, k, v, do = at_head(q, place), at_head(k, place), at_head(v, place), at_head(do, place)

    if dq is not None:
        dq = at_head(dq, place)
        for start in range(place.first, place.end, META.BLOCK_N):
            i_n = start + tl.arange(0, META.BLOCK_N)
            b_do = load_tile(do, i_n, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            # Over the keys in view: sum of phi(k) (do.v), of phi(k), and of do.v.
            b_u = tl.full([META.BLOCK_N, META.BLOCK_D], 0.0, tl.float32)
            b_zs = tl.full([META.BLOCK_N, META.BLOCK_D], 0.0, tl.float32)
            b_sum = tl.full([META.BLOCK_N], 0.0, tl.float32)
            b_num_keys = (i_n - place.first + 1).to(tl.float32)
            if p_before is not None:
                b_s, b_w, b_z, num_keys = load_state(p_before, place.i_part, place, META)
                b_num_keys += num_keys
                b_u = dot_state(b_do, tl.trans(b_s), META)
                if META.NORMALIZED:
                    b_zs += b_z[None, :]
                    b_sum = tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
            for key_start in range(place.first, start + META.BLOCK_N, META.BLOCK_N):
                i_m = key_start + tl.arange(0, META.BLOCK_N)
                b_k = load_tile(k, i_m, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
                b_v = load_tile(v, i_m, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                b_ak, b_fk, _inverse = features(b_k, i_m, place, META)
                seen = i_n[:, None] >= i_m[None, :]
                b_p = tl.where(seen, dot(b_do, tl.trans(b_v), META), 0.0)  # [BLOCK_N, BLOCK_N]
                # A factor that is NaN or infinite must not reach earlier rows through a zero.
                b_p_scaled = tl.where(seen, b_p * b_fk[None, :], 0.0)
                b_u += masked_dot(b_p_scaled, b_ak, i_n, key_start, False, META)
                if META.NORMALIZED:
                    b_sum += tl.sum(b_p, axis=1)
                    b_factors = tl.where(seen, b_fk[None, :], 0.0)
                    b_zs += masked_dot(b_factors, b_ak, i_n, key_start, False, META)
            b_q = load_tile(q, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_aq, b_fq, b_inverse = query_features(b_q, i_n, place, META)
            b_denominator = b_fq
            if META.NORMALIZED:
                b_denominator = b_fq * tl.sum(b_aq.to(tl.float32) * b_zs, axis=1)
                if META.HAS_CONSTANT:
                    b_denominator += b_num_keys
            b_scale, unclamped = row_scale(b_denominator, b_num_keys, factor, i_n, place, META)
            b_e = b_scale * 0.0
            b_dphi = b_u * b_scale[:, None]
            if META.NORMALIZED:
                b_numerator = b_fq * tl.sum(b_aq.to(tl.float32) * b_u, axis=1)
                if META.HAS_CONSTANT:
                    b_numerator += b_sum
                b_e = tl.where(unclamped, -b_numerator * b_scale * b_scale, 0.0 * b_numerator)
                b_dphi += b_e[:, None] * b_zs
            if META.FIX_SINGLE_KEY:
                b_dphi = tl.where((i_n == 0)[:, None], 0.0, b_dphi)
            store_rows(p_rows, b_scale, b_e, i_n, place)
            b_dq = features_backward(b_dphi, b_q, b_inverse, META)
            store_tile(dq, b_dq, i_n, place, META.D, META.BLOCK_D)

    if dk is not None:
        if dq is not None:
            tl.debug_barrier()  # the rows' scale and e are written by other threads
        dk, dv = at_head(dk, place), at_head(dv, place)
        for key_start in range(place.first, place.end, META.BLOCK_N):
            i_m = key_start + tl.arange(0, META.BLOCK_N)
            b_k = load_tile(k, i_m, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(v, i_m, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_ak, b_fk, b_inverse = features(b_k, i_m, place, META)
            b_dv = tl.full([META.BLOCK_N, META.BLOCK_DV], 0.0, tl.float32)
            b_dphi = tl.full([META.BLOCK_N, META.BLOCK_D], 0.0, tl.float32)
            if p_after is not None:
                b_ds, b_dw, b_dz, _none = load_state(p_after, place.i_part, place, META)
                b_dv = dot_state(b_ak, b_ds, META) * b_fk[:, None] + b_dw[None, :]
                b_dphi = dot_state(b_v, tl.trans(b_ds), META) + b_dz[None, :]
            for start in range(key_start, place.end, META.BLOCK_N):
                i_n = start + tl.arange(0, META.BLOCK_N)
                b_q = load_tile(q, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
                b_do = load_tile(do, i_n, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                b_aq, b_fq, _inverse = query_features(b_q, i_n, place, META)
                b_scale, b_e = load_rows(p_rows, i_n, place)
                seen = i_m[:, None] <= i_n[None, :]  # transposed: a row for every key
                b_a = dot(b_ak, tl.trans(b_aq), META) * b_fk[:, None] * b_fq[None, :]
                if META.HAS_CONSTANT:
                    b_a += 1.0
                b_a = tl.where(seen, b_a * b_scale[None, :], 0.0)
                b_dv += masked_dot(b_a, b_do, i_m, start, True, META)
                b_da = dot(b_v, tl.trans(b_do), META) * b_scale[None, :] + b_e[None, :]
                b_da = tl.where(seen, b_da * b_fq[None, :], 0.0)
                b_dphi += masked_dot(b_da, b_aq, i_m, start, True, META)
            store_tile(dv, b_dv, i_m, place, META.DV, META.BLOCK_DV)
            b_dk = features_backward(b_dphi, b_k, b_inverse, META)
            store_tile(dk, b_dk, i_m, place, META.D, META.BLOCK_D)

# mypy: allow-untyped-defs
"""Causal linear attention in Triton: a masked tile per chunk, a running state for all before it.

A program walks over the chunks of its part with the state in registers: forwards for the output
and the gradient of the queries; backwards, with the gradient of the state, for those of keys and
values.
Where a sequence is one part, one launch computes everything. Otherwise every part first gets the
state before it, and in the backward the gradient from all parts after it. The derivation is in
linear_attention/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend.partition import Call, Launch
from linclip_kernels.linear_attention.triton_backend.primitives import (
    DENOMINATOR_EPS,
    LENGTHS,
    at_head,
    column_sums,
    combine_states,
    dot,
    dot_halves,
    features,
    features_backward,
    halves,
    load_state,
    load_tile,
    narrow,
    program_place,
    scaled_features,
    store_state,
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
    return [*launches, call.partition.launch(_forward_kernel, arguments, num_stages=3)]


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
    partition, (d_q, d_k, d_v) = call.partition, gradients
    shape = partition.batch, partition.heads, 3, partition.num_tokens
    rows = torch.empty(shape, dtype=torch.float32, device=grad.device)
    meta = call.arguments["META"]._replace(STATE_GRADIENT=grad_state is not None)
    common = call.arguments | {"META": meta}

    def launch(
        d_q: Tensor | None,
        d_k: Tensor | None,
        d_v: Tensor | None,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Launch:
        tensors = views(q=call.q, k=call.k, v=call.v, do=grad, dq=d_q, dk=d_k, dv=d_v)
        states = {"p_before": before, "p_after": after, "p_rows": rows}
        # Two buffers of the tiles of both sides do not leave room for a second program. Those of
        # the queries' side make eight warps spill on all but large chips.
        is_roomy = partition.num_warps == 4 or partition.chip.is_large
        num_stages = 3 if d_k is None and is_roomy else 2
        return partition.launch(_backward_kernel, tensors | states | common, num_stages)

    if call.is_whole and grad_state is None:
        return None, [launch(d_q, d_k, d_v)]
    launches, before = _plan_before(call, None)
    after = partition.empty_parts()
    d_initial = None if call.initial is None else partition.empty_states(partition.num_sequences)
    sums = views(q=call.q, do=grad) | {"p_rows": rows, "p_states": after} | call.arguments
    launches += [
        launch(d_q, None, None, before=before),
        partition.launch(_sum_queries_kernel, sums, num_stages=3),
        combine_states(
            after, partition, start=grad_state, before=after, total=d_initial, reverse=True
        ),
        launch(None, d_k, d_v, after=after),
    ]
    return d_initial, launches


def _plan_before(call: Call, total: Tensor | None) -> tuple[list[Launch], Tensor]:
    """Return the launches that sum the state before every part, and the tensor they fill."""
    before = call.partition.empty_parts()
    launches = [
        sum_states(call, before),
        combine_states(before, call.partition, start=call.initial, before=before, total=total),
    ]
    return launches, before


@triton.jit
def query_features(b_q, i_n, end, factor, META: tl.constexpr):
    """Return the features of q as (a, factor, inverse norm); the first row sees a single key."""
    b_a, b_factor, b_inverse = features(b_q, i_n, end, META)
    b_factor *= factor.qk_scale
    if META.FIX_SINGLE_KEY:
        b_factor = tl.where(i_n == 0, 0.0, b_factor)
    return b_a, b_factor, b_inverse


@triton.jit
def row_scales(b_sum, b_num_keys, factor, i_n, place, META: tl.constexpr):
    """Return the factor of every row's numerator, and where the sum of its scores, ``b_sum``, is
    not clamped."""
    b_scale, unclamped = b_num_keys * 0.0 + factor.scale, i_n >= 0
    if META.NORMALIZED:
        floor = DENOMINATOR_EPS * b_num_keys
        b_scale, unclamped = 1.0 / tl.maximum(b_sum, floor, tl.PropagateNan.ALL), b_sum >= floor
    elif META.LENGTH_FACTOR == "inverse":
        b_scale = factor.scale / b_num_keys
    elif META.LENGTH_FACTOR == "table":
        p = factor.p_table + (place.i_b * place.num_tokens + place.offset)
        b_scale *= tl.load(p + i_n, mask=i_n < place.end, other=0.0)
    return b_scale, unclamped


@triton.jit
def start_state(p_before, place, META: tl.constexpr):
    """Return S, w, z and the number of keys before the part."""
    if p_before is not None:
        b_s, b_w, b_z, num_keys = load_state(p_before, place.i_part, place, META)
    else:
        b_s = tl.full([META.BLOCK_D, META.BLOCK_DV], 0.0, tl.float32)
        b_w = tl.full([META.BLOCK_DV], 0.0, tl.float32)
        b_z = tl.full([META.BLOCK_D], 0.0, tl.float32)
        num_keys = 0.0
    return b_s, b_w, b_z, num_keys


@triton.jit
def add_keys(b_s, b_w, b_z, b_a, b_factor, b_v, META: tl.constexpr):
    """Return S, w and z with the keys of a chunk added."""
    if META.HAS_CONSTANT:
        b_w += tl.sum(column_sums(b_v, None, META), axis=1)
    if META.QK_NORM:
        if META.NORMALIZED or META.CENTERED:
            b_z += tl.sum(column_sums(b_a, b_factor, META), axis=1)
        b_v = narrow(b_v.to(tl.float32) * b_factor[:, None], b_v.dtype)
    elif META.NORMALIZED or META.CENTERED:
        b_z += tl.sum(column_sums(b_a, None, META), axis=1)
    return b_s + dot(tl.trans(b_a), b_v, META), b_w, b_z


@triton.jit
def add_queries(b_ds, b_dw, b_dz, b_a, b_g, b_gc, b_e, META: tl.constexpr):
    """Return dS, dw and dz with the queries of a chunk added."""
    if META.HAS_CONSTANT:
        b_dw += tl.sum(column_sums(b_gc, None, META), axis=1)
    if META.NORMALIZED or META.CENTERED:
        b_dz += tl.sum(column_sums(b_a, b_e, META), axis=1)
    return b_ds + dot(tl.trans(b_a), b_g, META), b_dw, b_dz


@triton.jit
def next_chunk_size(size, b_s):
    """Return the size of chunks for another pass over a part, after one with ``size``; 0: no more.

    A score beyond the diagonal of a chunk is zero, but zero times NaN or infinity is NaN: such a
    value reaches rows of its chunk that do not see it. It also ends in the last state S, or dS,
    which is ``b_s``; then the part is computed once more, with one token per chunk.
    """
    check = tl.sum(b_s)
    return tl.where((size == 1) | (check - check == 0), 0, 1)


@triton.jit
def forward_chunks(q, k, v, out, p_before, size, factor, place, META: tl.constexpr):
    """Write o of the part, in chunks of ``size`` tokens, and return the last state's S."""
    dtype: tl.constexpr = q.p.dtype.element_ty
    i = tl.arange(0, META.BLOCK_N)
    seen = i[:, None] >= i[None, :]
    b_s, b_w, b_z, num_keys = start_state(p_before, place, META)
    for start in range(place.first, place.end, size):
        i_n, end = start + i, tl.minimum(start + size, place.end)
        b_q = load_tile(q, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_k = load_tile(k, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v, i_n, end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, _inverse = query_features(b_q, i_n, end, factor, META)
        b_ak, b_fk, _inverse = features(b_k, i_n, end, META)
        b_phi = scaled_features(b_ak, b_fk, META)
        b_num_keys = num_keys + (i_n - place.first + 1).to(tl.float32)
        b_x = dot(b_a, tl.trans(b_phi), META) * b_factor[:, None]  # [BLOCK_N, BLOCK_N]
        if META.HAS_CONSTANT and not META.CENTERED:
            b_x += 1.0
        b_x = tl.where(seen, b_x, 0.0)
        b_high, b_low = halves(b_s, dtype)
        b_out = dot_halves(b_a, b_high, b_low, META) * b_factor[:, None]  # [BLOCK_N, BLOCK_DV]
        b_sum = b_factor
        if META.NORMALIZED or META.CENTERED:
            b_sum = b_factor * tl.sum(b_a.to(tl.float32) * b_z[None, :], axis=1)
            b_sum += tl.sum(b_x, axis=1)
        if META.CENTERED:
            b_constant = 1.0 - b_sum / b_num_keys
            b_x = tl.where(seen, b_x + b_constant[:, None], 0.0)
            b_out += b_constant[:, None] * b_w[None, :]
        elif META.HAS_CONSTANT:
            b_sum += b_num_keys - (i + 1)
            b_out += b_w[None, :]
        b_scale, _unclamped = row_scales(b_sum, b_num_keys, factor, i_n, place, META)
        b_out += dot(narrow(b_x, b_v.dtype), b_v, META)
        store_tile(out, b_out * b_scale[:, None], start, end, META.DV, META.BLOCK_DV, True)
        b_s, b_w, b_z = add_keys(b_s, b_w, b_z, b_ak, b_fk, b_v, META)
    return b_s


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q, k, v, out, p_before, factor, schedule, num_tokens, num_parts, part, META: tl.constexpr
):
    place = program_place(schedule, num_tokens, num_parts, part)
    q, k, v, out = at_head(q, place), at_head(k, place), at_head(v, place), at_head(out, place)
    size = META.BLOCK_N
    while size > 0:
        b_s = forward_chunks(q, k, v, out, p_before, size, factor, place, META)
        size = next_chunk_size(size, b_s)


@triton.jit
def query_chunks(q, k, v, do, dq, p_before, p_rows, size, factor, place, META: tl.constexpr):
    """Write dq, and what the side of the keys reads of every row; return the last state's S.

    u = S do, z and w below are sums over the keys in view of a row: those of the state before the
    chunk, and those of the chunk up to the row.
    """
    dtype: tl.constexpr = q.p.dtype.element_ty
    i = tl.arange(0, META.BLOCK_N)
    seen = i[:, None] >= i[None, :]
    b_s, b_w, b_z, num_keys = start_state(p_before, place, META)
    for start in range(place.first, place.end, size):
        i_n, end = start + i, tl.minimum(start + size, place.end)
        b_q = load_tile(q, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_k = load_tile(k, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v, i_n, end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_do = load_tile(do, i_n, end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_ak, b_fk, _inverse = features(b_k, i_n, end, META)
        b_phi = scaled_features(b_ak, b_fk, META)
        b_p = tl.where(seen, dot(b_do, tl.trans(b_v), META), 0.0)  # [BLOCK_N, BLOCK_N]
        b_high, b_low = halves(b_s, dtype)
        b_u = dot_halves(b_do, b_high, b_low, META, TRANSPOSED=True)  # [BLOCK_N, BLOCK_D]
        b_u += dot(narrow(b_p, b_phi.dtype), b_phi, META)
        b_a, b_factor, b_inverse = query_features(b_q, i_n, end, factor, META)
        b_num_keys = num_keys + (i_n - place.first + 1).to(tl.float32)
        # Of every row: a.u, a.z, do.w, the sum of its scores, and the constant 1 - x.z / n of its
        # centred scores. Where a variant needs none of one, its place is taken by any vector.
        b_au, b_az, b_gw, b_sum, b_constant = b_factor, b_factor, b_factor, b_factor, b_factor
        if META.NORMALIZED or META.QK_NORM:
            b_au = tl.sum(b_a.to(tl.float32) * b_u, axis=1)
        if META.NORMALIZED or META.CENTERED:
            b_zs = dot(narrow(seen.to(tl.float32), b_phi.dtype), b_phi, META) + b_z[None, :]
            b_az = tl.sum(b_a.to(tl.float32) * b_zs, axis=1)
            b_sum = b_factor * b_az
            if META.CENTERED:
                b_constant = 1.0 - b_sum / b_num_keys
            if META.HAS_CONSTANT:
                b_sum += b_num_keys
                b_gw = tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1) + tl.sum(b_p, axis=1)
        b_scale, unclamped = row_scales(b_sum, b_num_keys, factor, i_n, place, META)
        b_e = b_scale * 0.0
        # Until it is stored, e is divided by the scale, which multiplies all of dq.
        if META.NORMALIZED:
            b_e = b_factor * b_au
            if META.HAS_CONSTANT:
                b_e += b_gw
            b_e *= -b_scale
            b_e = tl.where(unclamped, b_e, 0.0 * b_e)
        elif META.CENTERED:
            b_e = -b_gw / b_num_keys
        if META.NORMALIZED or META.CENTERED:
            b_u += b_e[:, None] * b_zs
            b_au += b_e * b_az
        if META.FIX_SINGLE_KEY:
            b_au = tl.where(i_n == 0, 0.0, b_au)
            b_u = tl.where((i_n == 0)[:, None], 0.0, b_u)
        scale = (b_scale if META.ROWS_DIFFER else factor.scale) * factor.qk_scale
        b_dq = features_backward(b_u, b_q, b_inverse, b_au, scale, META)
        store_tile(dq, b_dq, start, end, META.D, META.BLOCK_D, True)
        if META.ROWS_DIFFER:
            store_rows(p_rows, b_scale, b_e * b_scale, b_constant, i_n, end, place, META)
        b_s, b_w, b_z = add_keys(b_s, b_w, b_z, b_ak, b_fk, b_v, META)
    return b_s


@triton.jit
def load_queries(q, do, p_rows, i_n, end, factor, place, META: tl.constexpr):
    """Return (a, g, gc, e) of rows of q, whose share of the gradient of the state before them is
    dS = sum of a g^T, dw = sum of gc, dz = sum of a e.

    With phi(q) = a * factor, they are g = factor * scale * do, gc = scale * do, if centred times
    the constant of the scores, and e = factor * the gradient of the sum of scores.
    """
    b_q = load_tile(q, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_do = load_tile(do, i_n, end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    b_a, b_factor, _inverse = query_features(b_q, i_n, end, factor, META)
    b_e = b_factor
    b_scale = b_factor * 0.0 + factor.scale
    b_constant = b_scale
    if META.ROWS_DIFFER:
        b_scale, b_e, b_constant = load_rows(p_rows, i_n, end, place, META)
        b_e *= b_factor
        b_constant = b_constant * b_scale if META.CENTERED else b_scale
    dtype: tl.constexpr = b_do.dtype
    b_do = b_do.to(tl.float32)
    b_g = narrow(b_do * (b_scale * b_factor)[:, None], dtype)
    return b_a, b_g, narrow(b_do * b_constant[:, None], dtype), b_e


@triton.jit(do_not_specialize=LENGTHS)
def _sum_queries_kernel(
    q, do, p_rows, p_states, factor, schedule, num_tokens, num_parts, part, META: tl.constexpr
):
    """Sum every part's gradient of the state before it."""
    place = program_place(schedule, num_tokens, num_parts, part)
    q, do = at_head(q, place), at_head(do, place)
    b_ds, b_dw, b_dz, _none = start_state(None, place, META)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n, end = start + tl.arange(0, META.BLOCK_N), place.end
        b_a, b_g, b_gc, b_e = load_queries(q, do, p_rows, i_n, end, factor, place, META)
        b_ds, b_dw, b_dz = add_queries(b_ds, b_dw, b_dz, b_a, b_g, b_gc, b_e, META)
    store_state(p_states, place.i_part, place, b_ds, b_dw, b_dz, 0.0, META)


@triton.jit
def key_chunks(q, k, v, do, dk, dv, p_after, p_rows, size, factor, place, META: tl.constexpr):
    """Write dk and dv of the part, from its last chunk to the first; return dS before the part."""
    dtype: tl.constexpr = k.p.dtype.element_ty
    i = tl.arange(0, META.BLOCK_N)
    seen = i[:, None] <= i[None, :]  # a row for every key
    b_ds, b_dw, b_dz, _none = start_state(p_after, place, META)
    num_chunks = tl.cdiv(place.end - place.first, size)
    for step in range(num_chunks):
        start = place.first + (num_chunks - 1 - step) * size
        i_n, end = start + i, tl.minimum(start + size, place.end)
        b_aq, b_g, b_gc, b_e = load_queries(q, do, p_rows, i_n, end, factor, place, META)
        b_k = load_tile(k, i_n, end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v, i_n, end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, b_inverse = features(b_k, i_n, end, META)
        b_high, b_low = halves(b_ds, dtype)

        b_x = tl.where(seen, dot(b_a, tl.trans(b_aq), META), 0.0)  # [BLOCK_N, BLOCK_N]
        b_dv = dot_halves(b_a, b_high, b_low, META)
        b_dv = (b_dv + dot(narrow(b_x, b_g.dtype), b_g, META)) * b_factor[:, None]
        if META.HAS_CONSTANT:
            b_dv += dot(narrow(seen.to(tl.float32), b_gc.dtype), b_gc, META) + b_dw[None, :]
        elif META.STATE_GRADIENT:
            b_dv += b_dw[None, :]
        store_tile(dv, b_dv, start, end, META.DV, META.BLOCK_DV, True)

        b_p = dot(b_v, tl.trans(b_g), META)  # [BLOCK_N, BLOCK_N]
        b_dphi = dot_halves(b_v, b_high, b_low, META, TRANSPOSED=True)  # [BLOCK_N, BLOCK_D]
        if META.NORMALIZED or META.CENTERED:
            b_p += b_e[None, :]
            b_dphi += b_dz[None, :]
        elif META.STATE_GRADIENT:
            b_dphi += b_dz[None, :]
        b_dphi += dot(narrow(tl.where(seen, b_p, 0.0), b_aq.dtype), b_aq, META)
        b_along = b_factor
        if META.QK_NORM:
            b_along = tl.sum(b_a.to(tl.float32) * b_dphi, axis=1)
        b_dk = features_backward(b_dphi, b_k, b_inverse, b_along, 1.0, META)
        store_tile(dk, b_dk, start, end, META.D, META.BLOCK_D, True)
        b_ds, b_dw, b_dz = add_queries(b_ds, b_dw, b_dz, b_aq, b_g, b_gc, b_e, META)
    return b_ds


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

    The side of the queries writes what that of the keys reads of every row.
    """
    place = program_place(schedule, num_tokens, num_parts, part)
    q, k, v, do = at_head(q, place), at_head(k, place), at_head(v, place), at_head(do, place)
    if dq is not None:
        dq = at_head(dq, place)
        size = META.BLOCK_N
        while size > 0:
            b_s = query_chunks(q, k, v, do, dq, p_before, p_rows, size, factor, place, META)
            size = next_chunk_size(size, b_s)
    if dk is not None:
        if dq is not None:
            tl.debug_barrier()  # the rows' scale, e and constant are written by other threads
        dk, dv = at_head(dk, place), at_head(dv, place)
        size = META.BLOCK_N
        while size > 0:
            b_ds = key_chunks(q, k, v, do, dk, dv, p_after, p_rows, size, factor, place, META)
            size = next_chunk_size(size, b_ds)


@triton.jit
def rows_at_head(p_rows, place):
    """Return the pointer to the rows of one head in [B, H, 3, N]."""
    i_row = (place.i_b * place.num_heads + place.i_h) * 3
    return p_rows + i_row * place.num_tokens + place.offset


@triton.jit
def load_rows(p_rows, i_n, end, place, META: tl.constexpr):
    """Return scale, e and constant of the rows i_n; of those a variant needs."""
    p, step = rows_at_head(p_rows, place) + i_n, place.num_tokens
    inside = i_n < end
    b_scale = tl.load(p, mask=inside, other=0.0)
    b_e, b_constant = b_scale, b_scale
    if META.NORMALIZED or META.CENTERED:
        b_e = tl.load(p + step, mask=inside, other=0.0)
    if META.CENTERED:
        b_constant = tl.load(p + 2 * step, mask=inside, other=0.0)
    return b_scale, b_e, b_constant


@triton.jit
def store_rows(p_rows, b_scale, b_e, b_constant, i_n, end, place, META: tl.constexpr):
    """Store what :func:`load_rows` loads."""
    p, step = rows_at_head(p_rows, place) + i_n, place.num_tokens
    inside = i_n < end
    tl.store(p, b_scale, mask=inside)
    if META.NORMALIZED or META.CENTERED:
        tl.store(p + step, b_e, mask=inside)
    if META.CENTERED:
        tl.store(p + 2 * step, b_constant, mask=inside)

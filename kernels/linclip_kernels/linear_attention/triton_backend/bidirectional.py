# mypy: allow-untyped-defs
"""Bidirectional linear attention in Triton: the state of all keys, then every row by itself.

Where a sequence is one part, one launch computes everything. Otherwise the parts' states are summed
first. Forward reads k, v, then q and writes o; backward reads q, do, then k, v and writes dq, dk,
dv. The derivation is in linear_attention/README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend.partition import Call, Launch
from linclip_kernels.linear_attention.triton_backend.primitives import (
    DENOMINATOR_EPS,
    LENGTHS,
    as_columns,
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
    outer,
    place_parts,
    program_place,
    scaled_features,
    store_state,
    store_tile,
    sum_states,
    sum_tokens,
    views,
)

__all__ = [
    "plan_apply",
    "plan_apply_backward",
    "plan_backward",
    "plan_forward",
    "plan_state",
    "plan_state_backward",
]


def plan_forward(call: Call, out: Tensor, state: Tensor | None) -> list[Launch]:
    """Return the launches that fill ``out`` and, if given, ``state``.

    Args:
        call: The inputs.
        out: [B, N, H, Dv].
        state: [S, H, D + 1, Dv + 1].
    """
    if call.is_whole:
        return [_launch_forward(call, None, out, save=state)]
    if state is None:
        state = call.partition.empty_states(call.partition.num_sequences)
    return [*plan_state(call, state), plan_apply(call, state, out)]


def plan_backward(
    call: Call,
    state: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, list[Launch]]:
    """Return the gradient of the initial state, if there is one, and the launches that fill all.

    Args:
        call: The inputs.
        state: The state of all keys, if the forward has kept it, [S, H, D + 1, Dv + 1].
        grad: The gradient of o, [B, N, H, Dv].
        grad_state: The gradient of the state, if there is one.
        gradients: dq and dk [B, N, H, D] and dv [B, N, H, Dv], to be filled.
    """
    d_q, d_k, d_v = gradients
    if call.is_whole and grad_state is None:
        return None, [_launch_backward(call, state, None, grad, d_q, d_k, d_v)]
    partition, launches = call.partition, []
    if state is None:
        state = partition.empty_states(partition.num_sequences)
        launches = plan_state(call, state)
    d_state = partition.empty_states(partition.num_sequences)
    launches += plan_apply_backward(call, state, grad, d_q, d_state, grad_state=grad_state)
    launches.append(plan_state_backward(call, d_state, d_k, d_v))
    return d_state, launches


def plan_state(call: Call, state: Tensor) -> list[Launch]:
    """Return the launches that fill ``state`` [S, H, D + 1, Dv + 1] with the sums over keys."""
    if call.is_whole:
        return [sum_states(call, state)]
    parts = call.partition.empty_parts()
    return [
        sum_states(call, parts),
        combine_states(parts, call.partition, start=call.initial, total=state),
    ]


def plan_state_backward(call: Call, d_state: Tensor, d_k: Tensor, d_v: Tensor) -> Launch:
    """Return the launch that fills dk and dv from the gradient of the state."""
    return _launch_backward(call, None, d_state, None, None, d_k, d_v)


def plan_apply(call: Call, state: Tensor, out: Tensor) -> Launch:
    """Return the launch that fills ``out`` [B, N, H, Dv] from the state of all keys."""
    return _launch_forward(call._replace(k=None, v=None), state, out)


def plan_apply_backward(
    call: Call,
    state: Tensor,
    grad: Tensor,
    d_q: Tensor,
    d_state: Tensor,
    *,
    grad_state: Tensor | None = None,
) -> list[Launch]:
    """Return the launches that fill dq, and ``d_state`` with the sum over queries + grad_state."""
    if call.partition.is_whole and grad_state is None:
        return [_launch_backward(call, state, d_state, grad, d_q)]
    parts = call.partition.empty_parts()
    return [
        _launch_backward(call, state, parts, grad, d_q),
        combine_states(parts, call.partition, start=grad_state, total=d_state),
    ]


def _launch_forward(
    call: Call, state: Tensor | None, out: Tensor, save: Tensor | None = None
) -> Launch:
    tensors = views(q=call.q, k=call.k, v=call.v, out=out)
    states = {"p_state": state, "p_save": save}
    return call.partition.launch(_forward_kernel, tensors | states | call.arguments)


def _launch_backward(
    call: Call,
    state: Tensor | None,
    d_state: Tensor | None,
    grad: Tensor | None,
    d_q: Tensor | None,
    d_k: Tensor | None = None,
    d_v: Tensor | None = None,
) -> Launch:
    """Return the launch of both sides, or of that side alone whose gradients are given."""
    q = None if d_q is None else call.q
    k, v = (None, None) if d_k is None else (call.k, call.v)
    tensors = views(q=q, k=k, v=v, do=grad, dq=d_q, dk=d_k, dv=d_v)
    states = {"p_state": state, "p_dstate": d_state}
    arguments = tensors | states | call.arguments
    return call.partition.launch(_backward_kernel, arguments, num_stages=3)


@triton.jit
def seen_state(b_s, b_w, b_z, num_keys, META: tl.constexpr):
    """Return S and z as queries see them: about the mean key, and without a sequence's only key."""
    if META.CENTERED:
        b_s -= b_z[:, None] * (b_w / num_keys)[None, :]
    if META.FIX_SINGLE_KEY:
        b_s = tl.where(num_keys == 1, 0.0, b_s)
        b_z = tl.where(num_keys == 1, 0.0, b_z)
    return b_s, b_z


@triton.jit
def unnormalized_scale(num_keys, factor, place, META: tl.constexpr):
    """Return Eq. 7's factor, the same for all rows of the sequence."""
    scale = factor.scale
    if META.LENGTH_FACTOR == "inverse":
        scale /= num_keys
    elif META.LENGTH_FACTOR == "table":
        scale *= tl.load(factor.p_table + place.i_s)
    return scale


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q, k, v, out, p_state, p_save, factor, schedule, num_tokens, num_parts, part, META: tl.constexpr
):
    """Without p_state, sum the keys first, and write their state to p_save if there is one."""
    place = program_place(schedule, num_tokens, num_parts, part)
    if p_state is None:
        b_s, b_w, b_z = sum_tokens(at_head(k, place), at_head(v, place), place, META)
        num_keys = place.length.to(tl.float32)
        if p_save is not None:
            store_state(p_save, place.i_s, place, b_s, b_w, b_z, num_keys, META)
    else:
        b_s, b_w, b_z, num_keys = load_state(p_state, place.i_s, place, META)
    b_s, b_z = seen_state(b_s, b_w, b_z, num_keys, META)
    # Not earlier: the pointers would take registers from the sum.
    q, out = at_head(q, place), at_head(out, place)
    dtype: tl.constexpr = q.p.dtype.element_ty
    b_high, b_low = halves(b_s, dtype)
    scale = 1.0
    if META.NORMALIZED:
        b_zs = as_columns(b_z, dtype, META)
    else:
        scale = unnormalized_scale(num_keys, factor, place, META)
        b_w *= scale
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_q = load_tile(q, i_n, place.end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_a, b_factor, _inverse = features(b_q, i_n, place.end, META)
        b_factor *= factor.qk_scale
        b_out = dot_halves(b_a, b_high, b_low, META)  # [BLOCK_N, BLOCK_DV]
        if META.NORMALIZED:
            b_denominator = b_factor * tl.sum(dot(b_a, b_zs, META), axis=1)
            if META.HAS_CONSTANT:
                b_denominator += num_keys
            b_scale = 1.0 / tl.maximum(
                b_denominator, DENOMINATOR_EPS * num_keys, tl.PropagateNan.ALL
            )
            b_out = b_out * (b_factor * b_scale)[:, None]
            if META.HAS_CONSTANT:
                b_out += b_scale[:, None] * b_w[None, :]
        else:
            b_out = b_out * (b_factor * scale)[:, None]
            if META.HAS_CONSTANT:
                b_out += b_w[None, :]
        store_tile(out, b_out, start, place.end, META.DV, META.BLOCK_DV, META.RECOMPUTE)


@triton.jit
def query_side(q, do, dq, b_s, b_w, b_z, num_keys, factor, place, META: tl.constexpr):
    """Write dq of the part and return its sums dS, dw and dz, for S and z as queries see them."""
    dtype: tl.constexpr = q.p.dtype.element_ty
    b_high, b_low = halves(b_s, dtype)
    scale = 1.0
    if META.NORMALIZED:
        b_ws, b_zs = as_columns(b_w, dtype, META), as_columns(b_z, dtype, META)
    else:
        scale = unnormalized_scale(num_keys, factor, place, META)
    b_ds = tl.full([META.BLOCK_D, META.BLOCK_DV], 0.0, tl.float32)
    b_dws = tl.full([META.BLOCK_DV, META.COLUMNS], 0.0, tl.float32)
    b_dzs = tl.full([META.BLOCK_D, META.COLUMNS], 0.0, tl.float32)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_q = load_tile(q, i_n, place.end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_do = load_tile(do, i_n, place.end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, b_inverse = features(b_q, i_n, place.end, META)
        b_factor *= factor.qk_scale
        b_scale, b_along = b_factor * 0.0 + scale, b_factor
        if META.NORMALIZED:
            b_az = tl.sum(dot(b_a, b_zs, META), axis=1)
            b_denominator, floor = b_factor * b_az, DENOMINATOR_EPS * num_keys
            if META.HAS_CONSTANT:
                b_denominator += num_keys
                b_gw = tl.sum(dot(b_do, b_ws, META), axis=1)
            b_scale = 1.0 / tl.maximum(b_denominator, floor, tl.PropagateNan.ALL)
            if META.HAS_CONSTANT:
                b_dws += column_sums(b_do, b_scale, META)
            b_g = narrow(b_do.to(tl.float32) * (b_factor * b_scale)[:, None], b_do.dtype)
        else:
            if META.HAS_CONSTANT:
                b_dws += column_sums(b_do, None, META)
            b_g = scaled_features(b_do, b_factor, META)
        b_ds += dot(tl.trans(b_a), b_g, META)
        b_u = dot_halves(b_do, b_high, b_low, META, TRANSPOSED=True)  # [BLOCK_N, BLOCK_D]
        if META.NORMALIZED or META.QK_NORM:
            b_along = tl.sum(b_a.to(tl.float32) * b_u, axis=1)
        if META.NORMALIZED:
            b_numerator = b_factor * b_along
            if META.HAS_CONSTANT:
                b_numerator += b_gw
            # e over the scale, which multiplies all of dq.
            b_e = -b_numerator * b_scale
            b_e = tl.where(b_denominator >= floor, b_e, 0.0 * b_e)
            b_u += outer(b_e, b_z, dtype, META)
            b_along += b_e * b_az
            b_dzs += column_sums(b_a, b_factor * b_scale * b_e, META)
        b_scale *= factor.qk_scale
        b_dq = features_backward(b_u, b_q, b_inverse, b_along, b_scale, META)
        store_tile(dq, b_dq, start, place.end, META.D, META.BLOCK_D, META.RECOMPUTE)
    b_dw, b_dz = tl.sum(b_dws, axis=1), tl.sum(b_dzs, axis=1)
    if not META.NORMALIZED:
        b_ds, b_dw = b_ds * scale, b_dw * scale
        if not META.QK_NORM:  # then scaled_features has left it out
            b_ds *= factor.qk_scale
    return b_ds, b_dw, b_dz


@triton.jit
def key_side(k, v, dk, dv, b_ds, b_dw, b_dz, place, META: tl.constexpr):
    """Write dk and dv of the part."""
    dtype: tl.constexpr = k.p.dtype.element_ty
    b_high, b_low = halves(b_ds, dtype)
    if META.BLOCK_N >= 64:
        b_dzs = place_parts(b_dz, tl.arange(0, 16), dtype)
        b_ones = narrow(tl.full([META.BLOCK_N, 16], 1.0, tl.float32), b_dzs.dtype)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_k = load_tile(k, i_n, place.end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v, i_n, place.end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, b_inverse = features(b_k, i_n, place.end, META)
        b_dv = dot_halves(b_a, b_high, b_low, META) * b_factor[:, None] + b_dw[None, :]
        store_tile(dv, b_dv, start, place.end, META.DV, META.BLOCK_DV)
        b_dphi = dot_halves(b_v, b_high, b_low, META, TRANSPOSED=True)
        if META.BLOCK_N >= 64:  # as a row of wgmma's layout, dz would fill 16 or 32 registers
            b_dphi += dot(b_ones, tl.trans(b_dzs), META)
        else:
            b_dphi += b_dz[None, :]
        b_along = b_factor
        if META.QK_NORM:
            b_along = tl.sum(b_a.to(tl.float32) * b_dphi, axis=1)
        b_dk = features_backward(b_dphi, b_k, b_inverse, b_along, 1.0, META)
        store_tile(dk, b_dk, start, place.end, META.D, META.BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_kernel(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    p_state,
    p_dstate,
    factor,
    schedule,
    num_tokens,
    num_parts,
    part,
    META: tl.constexpr,
):
    """Compute both sides; without dk the side of the queries alone, without dq that of the keys."""
    place = program_place(schedule, num_tokens, num_parts, part)
    if dk is not None:
        k, v = at_head(k, place), at_head(v, place)

    if dq is None:
        b_ds, b_dw, b_dz, _none = load_state(p_dstate, place.i_s, place, META)
    else:
        if p_state is None:
            b_s, b_w, b_z = sum_tokens(k, v, place, META)
            num_keys = place.length.to(tl.float32)
        else:
            b_s, b_w, b_z, num_keys = load_state(p_state, place.i_s, place, META)
        b_s, b_seen_z = seen_state(b_s, b_w, b_z, num_keys, META)
        q, do, dq = at_head(q, place), at_head(do, place), at_head(dq, place)
        b_ds, b_dw, b_dz = query_side(q, do, dq, b_s, b_w, b_seen_z, num_keys, factor, place, META)
        if META.FIX_SINGLE_KEY:
            b_ds = tl.where(num_keys == 1, 0.0, b_ds)
            b_dz = tl.where(num_keys == 1, 0.0, b_dz)
        if META.CENTERED:
            b_dw -= tl.sum(b_ds * b_z[:, None], axis=0) / num_keys
            b_dz = -tl.sum(b_ds * b_w[None, :], axis=1) / num_keys

    if dk is None:
        store_state(p_dstate, place.i_part, place, b_ds, b_dw, b_dz, 0.0, META)
    else:
        dk, dv = at_head(dk, place), at_head(dv, place)
        key_side(k, v, dk, dv, b_ds, b_dw, b_dz, place, META)

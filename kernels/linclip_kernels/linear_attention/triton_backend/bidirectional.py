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
    assert call.k is not None
    assert call.v is not None
    if call.is_whole:
        return [sum_states(call.k, call.v, None, state, call.partition)]
    parts = call.partition.empty_parts()
    return [
        sum_states(call.k, call.v, None, parts, call.partition),
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
    return call.partition.launch(_backward_kernel, tensors | states | call.arguments)


@triton.jit
def query_rows(b_q, b_z, num_keys, factor, i_n, place, META: tl.constexpr):
    """Return features of q as (a, factor, inverse norm), the rows' scale, where it is unclamped."""
    b_a, b_factor, b_inverse = features(b_q, i_n, place, META)
    if META.FIX_SINGLE_KEY:
        b_factor = tl.where(num_keys == 1, 0.0, b_factor)
    b_denominator = b_factor
    if META.NORMALIZED:
        b_denominator = b_factor * tl.sum(b_a.to(tl.float32) * b_z[None, :], axis=1)
        if META.HAS_CONSTANT:
            b_denominator += num_keys
    b_scale, unclamped = row_scale(b_denominator, num_keys, factor, i_n, place, META)
    return b_a, b_factor, b_inverse, b_scale, unclamped


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q, k, v, out, p_state, p_save, factor, schedule, num_tokens, num_parts, part, META: tl.constexpr
):
    """Without p_state, sum the keys first, and write their state to p_save if there is one."""
    place = program_place(schedule, num_tokens, num_parts, part)
    if p_state is None:
        b_s, b_w, b_z = sum_tokens(at_head(k, place), at_head(v, place), None, place, META)
        num_keys = place.length.to(tl.float32)
        if p_save is not None:
            store_state(p_save, place.i_s, place, b_s, b_w, b_z, num_keys, META)
    else:
        b_s, b_w, b_z, num_keys = load_state(p_state, place.i_s, place, META)
    # Not earlier: the pointers would take registers from the sum.
    q, out = at_head(q, place), at_head(out, place)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_q = load_tile(q, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_a, b_factor, _inverse, b_scale, _unclamped = query_rows(
            b_q, b_z, num_keys, factor, i_n, place, META
        )
        b_out = dot_state(b_a, b_s, META) * b_factor[:, None]  # [BLOCK_N, BLOCK_DV]
        if META.HAS_CONSTANT:
            b_out += b_w[None, :]
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
            b_s, b_w, b_z = sum_tokens(k, v, None, place, META)
            num_keys = place.length.to(tl.float32)
        else:
            b_s, b_w, b_z, num_keys = load_state(p_state, place.i_s, place, META)
        q, do, dq = at_head(q, place), at_head(do, place), at_head(dq, place)
        b_ds = tl.full([META.BLOCK_D, META.BLOCK_DV], 0.0, tl.float32)
        b_dws = tl.full([META.ROWS_DV, META.BLOCK_DV], 0.0, tl.float32)
        b_dzs = tl.full([META.ROWS_D, META.BLOCK_D], 0.0, tl.float32)
        for start in range(place.first, place.end, META.BLOCK_N):
            i_n = start + tl.arange(0, META.BLOCK_N)
            b_q = load_tile(q, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_do = load_tile(do, i_n, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_a, b_factor, b_inverse, b_scale, unclamped = query_rows(
                b_q, b_z, num_keys, factor, i_n, place, META
            )
            b_u = dot_state(b_do, tl.trans(b_s), META)  # [BLOCK_N, BLOCK_D]
            b_dphi = b_u * b_scale[:, None]
            if META.NORMALIZED:
                b_numerator = b_factor * tl.sum(b_a.to(tl.float32) * b_u, axis=1)
                if META.HAS_CONSTANT:
                    b_numerator += tl.sum(b_do.to(tl.float32) * b_w[None, :], axis=1)
                b_e = tl.where(unclamped, -b_numerator * b_scale * b_scale, 0.0 * b_numerator)
                b_dphi += b_e[:, None] * b_z[None, :]
                b_dzs += fold_rows(b_a.to(tl.float32) * (b_factor * b_e)[:, None], META.ROWS_D)
            if META.FIX_SINGLE_KEY:
                b_dphi = tl.where(num_keys == 1, 0.0, b_dphi)
            b_dq = features_backward(b_dphi, b_q, b_inverse, META)
            store_tile(dq, b_dq, i_n, place, META.D, META.BLOCK_D)
            if META.HAS_CONSTANT:
                b_dws += fold_rows(b_do.to(tl.float32) * b_scale[:, None], META.ROWS_DV)
            b_scaled = b_do.to(tl.float32) * (b_factor * b_scale)[:, None]
            b_ds += dot(tl.trans(b_a), narrow(b_scaled, b_do.dtype), META)
        b_dw, b_dz = tl.sum(b_dws, axis=0), tl.sum(b_dzs, axis=0)

    if dk is None:
        store_state(p_dstate, place.i_part, place, b_ds, b_dw, b_dz, 0.0, META)
    else:
        dk, dv = at_head(dk, place), at_head(dv, place)
        for start in range(place.first, place.end, META.BLOCK_N):
            i_n = start + tl.arange(0, META.BLOCK_N)
            b_k = load_tile(k, i_n, place, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_v = load_tile(v, i_n, place, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_a, b_factor, b_inverse = features(b_k, i_n, place, META)
            b_dv = dot_state(b_a, b_ds, META) * b_factor[:, None] + b_dw[None, :]
            store_tile(dv, b_dv, i_n, place, META.DV, META.BLOCK_DV)
            b_dphi = dot_state(b_v, tl.trans(b_ds), META) + b_dz[None, :]
            b_dk = features_backward(b_dphi, b_k, b_inverse, META)
            store_tile(dk, b_dk, i_n, place, META.D, META.BLOCK_D)

"""Linear attention in Triton, forward and backward: either order, wide values in blocks.

Every column of v is a problem of its own once the scores are known. Values wider than one program's
state are computed block by block; the shares of dq and dk are added in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Split,
    max_value_block,
    run,
    score_arguments,
    split_tokens,
)
from linclip_kernels.linear_attention.variant import Form

__all__ = [
    "apply_state",
    "apply_state_backward",
    "backward",
    "forward",
    "sum_keys",
    "sum_keys_backward",
]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    form: Form,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: State [S, H, D + 1, Dv + 1] of earlier keys, one per sequence.
        boundaries: Where the S sequences begin and end; None: S = B sequences of N tokens.
        form: Which form.

    Returns:
        o [B, N, H, Dv] in v.dtype, and with return_state the state [S, H, D + 1, Dv + 1].
    """
    plans = causal if form.causal else bidirectional
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states: list[Tensor] = []
    for columns in _value_blocks(q, v.shape[-1]):
        call = _call(q, k, v, initial, boundaries, form, columns, backward=False)
        state = call.split.empty_states(call.split.num_sequences) if return_state else None
        run(plans.plan_forward(call, out[..., columns], state), q.device)
        if state is not None:
            states.append(state)
    return out, _join(states) if return_state else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    form: Form,
    state: Tensor | None,
    grad: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the initial state, from those of o and the state (None: zero).

    Args:
        state: What the forward has returned, or None.
    """
    plans = causal if form.causal else bidirectional
    grad = torch.zeros_like(v) if grad is None else grad
    blocks = _value_blocks(q, v.shape[-1])
    d_q, d_k = _Shares(q, blocks), _Shares(k, blocks)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_states: list[Tensor] = []
    for columns in blocks:
        call = _call(q, k, v, initial, boundaries, form, columns, backward=True)
        kept = None if state is None else _columns(state, columns)
        end = None if grad_state is None else _gradient_columns(grad_state, columns)
        with d_q.share() as d_q_share, d_k.share() as d_k_share:
            gradients = d_q_share, d_k_share, d_v[..., columns]
            d_state, launches = plans.plan_backward(call, kept, grad[..., columns], end, gradients)
            run(launches, q.device)
        if d_state is not None:
            d_states.append(d_state)
    d_initial = None if initial is None else _join_gradients(d_states)
    return d_q.sum(), d_k.sum(), d_v, d_initial


def sum_keys(k: Tensor, v: Tensor, form: Form) -> Tensor:
    """The state of all keys, [B, H, D + 1, Dv + 1], of which there may be none."""
    batch, num_tokens, heads, key_dim = k.shape
    if num_tokens == 0:
        return k.new_zeros(batch, heads, key_dim + 1, v.shape[-1] + 1, dtype=torch.float32)
    states: list[Tensor] = []
    for columns in _value_blocks(k, v.shape[-1]):
        split = split_tokens(k, columns.stop - columns.start, form, backward=False)
        states.append(split.empty_states(batch))
        run(bidirectional.plan_state(k, v[..., columns], states[-1], split, form), k.device)
    return _join(states)


def sum_keys_backward(
    k: Tensor, v: Tensor, form: Form, grad_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v from that of their state."""
    if k.shape[1] == 0:
        return k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = _value_blocks(k, v.shape[-1])
    d_k, d_v = _Shares(k, blocks), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for columns in blocks:
        split = split_tokens(k, columns.stop - columns.start, form, backward=True)
        arguments = score_arguments(split, form, 1.0, None)
        end = _gradient_columns(grad_state, columns)
        with d_k.share() as share:
            tensors = k, v[..., columns], end, share, d_v[..., columns]
            run([bidirectional.plan_state_backward(*tensors, split, arguments)], k.device)
    return d_k.sum(), d_v


def apply_state(q: Tensor, state: Tensor, form: Form) -> Tensor:
    """o [B, N, H, Dv] of queries that all see the keys of ``state`` [B, H, D + 1, Dv + 1]."""
    out = torch.empty(*q.shape[:-1], state.shape[-1] - 1, dtype=q.dtype, device=q.device)
    if q.shape[1] == 0:
        return out
    for columns in _value_blocks(q, out.shape[-1]):
        split, arguments = _query_arguments(q, state, columns, form, backward=False)
        tensors = q, _columns(state, columns), out[..., columns]
        run([bidirectional.plan_apply(*tensors, split, arguments)], q.device)
    return out


def apply_state_backward(
    q: Tensor, state: Tensor, form: Form, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the state from that of o."""
    if q.shape[1] == 0:
        return q.new_empty(q.shape), state.new_zeros(state.shape)
    blocks = _value_blocks(q, grad.shape[-1])
    d_q, d_states = _Shares(q, blocks), []
    for columns in blocks:
        split, arguments = _query_arguments(q, state, columns, form, backward=True)
        d_states.append(split.empty_states(split.num_sequences))
        with d_q.share() as share:
            tensors = q, _columns(state, columns), grad[..., columns], share, d_states[-1]
            run(bidirectional.plan_apply_backward(*tensors, split, arguments), q.device)
    return d_q.sum(), _join_gradients(d_states)


class _Shares:
    """A gradient of q or k to which every block of values adds; in float32 if there are several."""

    def __init__(self, x: Tensor, blocks: list[slice]) -> None:
        self.x, self.dtype = x, x.dtype if len(blocks) == 1 else torch.float32
        self.total: Tensor | None = None

    @contextmanager
    def share(self) -> Iterator[Tensor]:
        """Room for the next share, which is to be filled inside."""
        share = torch.empty(self.x.shape, dtype=self.dtype, device=self.x.device)
        yield share
        self.total = share if self.total is None else self.total.add_(share)

    def sum(self) -> Tensor:
        assert self.total is not None
        return self.total.to(self.x.dtype)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    form: Form,
    columns: slice,
    *,
    backward: bool,
) -> Call:
    v, initial = v[..., columns], None if initial is None else _columns(initial, columns)
    split = split_tokens(q, v.shape[-1], form, boundaries, backward=backward)
    return Call(q, k, v, initial, split, form, *_factor(initial, split, form))


def _query_arguments(
    q: Tensor, state: Tensor, columns: slice, form: Form, *, backward: bool
) -> tuple[Split, dict[str, Any]]:
    """The split of queries that see a given state, and what their kernels take."""
    split = split_tokens(q, columns.stop - columns.start, form, backward=backward)
    scale, factor = float(form.score_scale), None
    if form.has_length_factor:
        num_keys = state[:, 0, 0, -1:].double()  # [B, 1]
        factors = (num_keys**-form.length_exponent).float()
        factor = factors.expand(-1, split.num_tokens).contiguous()
    return split, score_arguments(split, form, scale, factor)


def _value_blocks(q: Tensor, value_dim: int) -> list[slice]:
    block = max_value_block(q)
    return [slice(i, min(i + block, value_dim)) for i in range(0, value_dim, block)]


def _columns(state: Tensor, columns: slice) -> Tensor:
    """The state of a block of values: its columns, and the last one, contiguous."""
    if columns.start == 0 and columns.stop == state.shape[-1] - 1:
        return state.contiguous()
    return torch.cat([state[..., columns], state[..., -1:]], dim=-1)


def _gradient_columns(grad_state: Tensor, columns: slice) -> Tensor:
    """The same of a state's gradient, that of z to the first block alone."""
    part = _columns(grad_state, columns)
    if columns.start != 0:
        part[..., 1:, -1] = 0
    return part


def _join(states: list[Tensor]) -> Tensor:
    """The inverse."""
    if len(states) == 1:
        return states[0]
    return torch.cat([*(x[..., :-1] for x in states), states[0][..., -1:]], dim=-1)


def _join_gradients(states: list[Tensor]) -> Tensor:
    """The inverse for gradients: those of z are shares, and the number of keys has none."""
    joined = _join(states)
    for other in states[1:]:
        joined[..., -1] += other[..., -1]
    joined[..., 0, -1] = 0
    return joined


def _factor(initial: Tensor | None, split: Split, form: Form) -> tuple[float, Tensor | None]:
    """Scale of all rows of the unnormalised form, and a table [B, N] of single factors."""
    if not form.has_length_factor:
        return float(form.score_scale), None
    if not form.causal and initial is None and split.boundaries is None:
        return form.score_scale * split.num_tokens**-form.length_exponent, None
    place = torch.arange(split.num_tokens, dtype=torch.float64, device=split.device)
    if split.boundaries is None:
        num_keys = (place + 1 if form.causal else 0 * place + split.num_tokens).view(1, -1)
        if initial is not None:
            num_keys = num_keys + initial[:, 0, 0, -1:]
    else:
        starts = split.to_device(split.boundaries)
        lengths, size = starts.diff(), split.num_tokens
        first = (starts[:-1] - 1 if form.causal else -lengths).double()
        if initial is not None:
            first = first - initial[:, 0, 0, -1]
        num_keys = -first.repeat_interleave(lengths, output_size=size)
        num_keys = (num_keys + place if form.causal else num_keys).view(1, -1)
    factors = (num_keys**-form.length_exponent).float()
    return float(form.score_scale), factors.expand(split.batch, -1).contiguous()

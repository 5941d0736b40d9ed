"""Linear attention in Triton, forward and backward: either order, wide values in blocks.

Every column of v is a problem of its own once the scores are known. Values wider than one program's
state are computed block by block; the shares of dq and dk are added in float32.
"""

import torch
from torch import Tensor

from linclip_kernels.linear_attention import causal, noncausal
from linclip_kernels.linear_attention.form import Form
from linclip_kernels.linear_attention.split import (
    Call,
    Split,
    max_value_block,
    run,
    split_tokens,
)

__all__ = ["backward", "forward"]


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
    plans = causal if form.causal else noncausal
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states: list[Tensor] = []
    for columns in _value_blocks(q, v):
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
    plans = causal if form.causal else noncausal
    grad = torch.zeros_like(v) if grad is None else grad
    blocks = _value_blocks(q, v)
    # Shares of dq and dk are added in float32; as a rule there is one.
    dtype = q.dtype if len(blocks) == 1 else torch.float32
    d_q, d_k = (torch.empty(q.shape, dtype=dtype, device=q.device) for _ in range(2))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_states: list[Tensor] = []
    for columns in blocks:
        call = _call(q, k, v, initial, boundaries, form, columns, backward=True)
        end = _columns(grad_state, columns)
        is_first = columns.start == 0
        if end is not None and not is_first:
            end[..., 1:, -1] = 0  # the gradient of z goes through the first block
        shares = (d_q, d_k) if is_first else (torch.empty_like(d_q), torch.empty_like(d_k))
        d_state, launches = plans.plan_backward(
            call, _columns(state, columns), grad[..., columns], end, (*shares, d_v[..., columns])
        )
        run(launches, q.device)
        if not is_first:
            d_q += shares[0]
            d_k += shares[1]
        if d_state is not None:
            d_states.append(d_state)
    d_initial = None if initial is None else _join_gradients(d_states)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v, d_initial


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
    v, initial = v[..., columns], _columns(initial, columns)
    split = split_tokens(q, v, form, boundaries, backward=backward)
    return Call(q, k, v, initial, split, form, *_factor(initial, split, form))


def _value_blocks(q: Tensor, v: Tensor) -> list[slice]:
    block, value_dim = max_value_block(q), v.shape[-1]
    return [slice(i, min(i + block, value_dim)) for i in range(0, value_dim, block)]


def _columns(state: Tensor | None, columns: slice) -> Tensor | None:
    """The state of a block of values: its columns, and the last one, contiguous."""
    if state is None:
        return None
    if columns.start == 0 and columns.stop == state.shape[-1] - 1:
        return state.contiguous()
    return torch.cat([state[..., columns], state[..., -1:]], dim=-1)


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

"""Linear attention in Triton, forward and backward, for bidirectional and causal order.

Every column of v is a problem of its own once the scores are known. Values wider than one program's
state are computed block by block; the shares of dq and dk are added in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Partition,
    RowFactor,
    max_value_block,
    partition_tokens,
    run,
)
from linclip_kernels.linear_attention.variant import Variant

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
    variant: Variant,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, with return_state, the state; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: The state [S, H, D + 1, Dv + 1] of earlier keys, one per sequence.
        boundaries: Begin and end of the S sequences; None: S = B sequences of N tokens.
        variant: The variant to compute.
        return_state: Whether to compute the state.

    Returns:
        o [B, N, H, Dv] in v.dtype, and the state [S, H, D + 1, Dv + 1] or None.
    """
    plans = causal if variant.causal else bidirectional
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states: list[Tensor] = []
    for columns in _value_blocks(q, v.shape[-1]):
        call = _call(q, k, v, initial, boundaries, variant, columns, backward=False)
        partition, state = call.partition, None
        if return_state:
            state = partition.empty_states(partition.num_sequences)
            states.append(state)
        run(plans.plan_forward(call, out[..., columns], state), q.device)
    return out, _join(states) if return_state else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    variant: Variant,
    state: Tensor | None,
    grad: Tensor | None,
    grad_state: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Compute the gradients of q, k, v and the initial state.

    Args:
        q, k, v, initial, boundaries, variant: The arguments of :func:`forward`.
        state: The state that the forward has returned, or None.
        grad: The gradient of o [B, N, H, Dv]; None: zero.
        grad_state: The gradient of the state [S, H, D + 1, Dv + 1]; None: zero.
        gradients: Receive dq and dk [B, N, H, D] and dv [B, N, H, Dv], with any strides.

    Returns:
        The gradient of the initial state, [S, H, D + 1, Dv + 1], or None.
    """
    plans = causal if variant.causal else bidirectional
    grad = torch.zeros_like(v) if grad is None else grad
    blocks = _value_blocks(q, v.shape[-1])
    d_q, d_k = (_GradientSum(out, blocks) for out in gradients[:2])
    d_v = gradients[2]
    d_states: list[Tensor] = []
    for columns in blocks:
        call = _call(q, k, v, initial, boundaries, variant, columns, backward=True)
        kept = None if state is None else _columns(state, columns)
        end = None if grad_state is None else _gradient_columns(grad_state, columns)
        shares = d_q.share(), d_k.share(), d_v[..., columns]
        d_state, launches = plans.plan_backward(call, kept, grad[..., columns], end, shares)
        run(launches, q.device)
        if d_state is not None:
            d_states.append(d_state)
    d_q.write()
    d_k.write()
    return None if initial is None else _join_gradients(d_states)


def sum_keys(k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """Return the state of all keys, [B, H, D + 1, Dv + 1]; there may be none."""
    batch, num_tokens, heads, key_dim = k.shape
    if num_tokens == 0:
        return k.new_zeros(batch, heads, key_dim + 1, v.shape[-1] + 1, dtype=torch.float32)
    states: list[Tensor] = []
    for columns in _value_blocks(k, v.shape[-1]):
        call = _call(None, k, v, None, None, variant, columns, backward=False)
        states.append(call.partition.empty_states(batch))
        run(bidirectional.plan_state(call, states[-1]), k.device)
    return _join(states)


def sum_keys_backward(
    k: Tensor, v: Tensor, variant: Variant, grad_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v from that of their state."""
    if k.shape[1] == 0:
        return k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = _value_blocks(k, v.shape[-1])
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_k_sum = _GradientSum(d_k, blocks)
    for columns in blocks:
        call = _call(None, k, v, None, None, variant, columns, backward=True)
        end = _gradient_columns(grad_state, columns)
        launch = bidirectional.plan_state_backward(call, end, d_k_sum.share(), d_v[..., columns])
        run([launch], k.device)
    d_k_sum.write()
    return d_k, d_v


def apply_state(q: Tensor, state: Tensor, variant: Variant) -> Tensor:
    """Return o [B, N, H, Dv] of queries that all see ``state`` [B, H, D + 1, Dv + 1]."""
    out = torch.empty(*q.shape[:-1], state.shape[-1] - 1, dtype=q.dtype, device=q.device)
    if q.shape[1] == 0:
        return out
    for columns in _value_blocks(q, out.shape[-1]):
        call = _query_call(q, state, variant, columns, backward=False)
        run([bidirectional.plan_apply(call, _columns(state, columns), out[..., columns])], q.device)
    return out


def apply_state_backward(
    q: Tensor, state: Tensor, variant: Variant, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and of the state from that of o."""
    if q.shape[1] == 0:
        return q.new_empty(q.shape), state.new_zeros(state.shape)
    blocks = _value_blocks(q, grad.shape[-1])
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_q_sum, d_states = _GradientSum(d_q, blocks), []
    for columns in blocks:
        call = _query_call(q, state, variant, columns, backward=True)
        d_states.append(call.partition.empty_states(q.shape[0]))
        tensors = _columns(state, columns), grad[..., columns], d_q_sum.share(), d_states[-1]
        run(bidirectional.plan_apply_backward(call, *tensors), q.device)
    d_q_sum.write()
    return d_q, _join_gradients(d_states)


class _GradientSum:
    """A gradient of q or k to which every block of values adds; in float32 if there are several.

    Args:
        out: Receives the gradient, that of a single block without a copy.
        blocks: The blocks of values.
    """

    def __init__(self, out: Tensor, blocks: Sequence[slice]) -> None:
        self.out, self.is_single = out, len(blocks) == 1
        self.shares: list[Tensor] = []

    def share(self) -> Tensor:
        """Return an empty tensor, to be filled with one block's share."""
        if self.is_single:
            return self.out
        self._add()
        self.shares.append(torch.empty(self.out.shape, device=self.out.device))
        return self.shares[-1]

    def write(self) -> None:
        """Write the sum of all shares."""
        self._add()
        if self.shares:
            self.out.copy_(self.shares[0])

    def _add(self) -> None:
        if len(self.shares) == 2:
            self.shares[0].add_(self.shares.pop())


def _call(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    variant: Variant,
    columns: slice,
    *,
    backward: bool,
) -> Call:
    v, initial = v[..., columns], None if initial is None else _columns(initial, columns)
    partition = partition_tokens(k, v.shape[-1], variant, boundaries, backward=backward)
    return Call(q, k, v, initial, partition, _row_factor(initial, partition))


def _query_call(
    q: Tensor, state: Tensor, variant: Variant, columns: slice, *, backward: bool
) -> Call:
    """Return the call of queries that see a given state."""
    value_dim = columns.stop - columns.start
    partition = partition_tokens(q, value_dim, variant, backward=backward)
    factors = None
    if variant.has_length_factor:
        num_keys = state[:, 0, 0, -1:].double()  # [B, 1]
        factors = _factors(num_keys, partition)
    return Call(q, None, None, None, partition, RowFactor(float(variant.score_scale), factors))


def _value_blocks(q: Tensor, value_dim: int) -> list[slice]:
    block = max_value_block(q)
    return [slice(i, min(i + block, value_dim)) for i in range(0, value_dim, block)]


def _columns(state: Tensor, columns: slice) -> Tensor:
    """Return the state of a block of values: its columns, and the last one, contiguous."""
    if columns.start == 0 and columns.stop == state.shape[-1] - 1:
        return state.contiguous()
    return torch.cat([state[..., columns], state[..., -1:]], dim=-1)


def _gradient_columns(grad_state: Tensor, columns: slice) -> Tensor:
    """Return the same of a state's gradient; that of z goes to the first block alone."""
    part = _columns(grad_state, columns)
    if columns.start != 0:
        part[..., 1:, -1] = 0
    return part


def _join(states: list[Tensor]) -> Tensor:
    """Return the state of all values from those of the blocks."""
    if len(states) == 1:
        return states[0]
    return torch.cat([*(x[..., :-1] for x in states), states[0][..., -1:]], dim=-1)


def _join_gradients(states: list[Tensor]) -> Tensor:
    """Return the same for gradients: those of z add up, and the number of keys has none."""
    joined = _join(states)
    for other in states[1:]:
        joined[..., -1] += other[..., -1]
    joined[..., 0, -1] = 0
    return joined


def _row_factor(initial: Tensor | None, partition: Partition) -> RowFactor:
    """Return the factor of the rows of an unnormalised variant."""
    variant, boundaries = partition.variant, partition.boundaries
    if not variant.has_length_factor:
        return RowFactor(float(variant.score_scale), None)
    if not variant.causal and initial is None and boundaries is None:
        length_factor = partition.num_tokens**-variant.length_exponent
        return RowFactor(variant.score_scale * length_factor, None)
    place = torch.arange(partition.num_tokens, dtype=torch.float64, device=partition.device)
    if boundaries is None:
        num_keys = (place + 1 if variant.causal else 0 * place + partition.num_tokens).view(1, -1)
        if initial is not None:
            num_keys = num_keys + initial[:, 0, 0, -1:]
    else:
        starts = partition.to_device(boundaries)
        lengths, size = starts.diff(), partition.num_tokens
        first = (starts[:-1] - 1 if variant.causal else -lengths).double()
        if initial is not None:
            first = first - initial[:, 0, 0, -1]
        num_keys = -first.repeat_interleave(lengths, output_size=size)
        num_keys = (num_keys + place if variant.causal else num_keys).view(1, -1)
    return RowFactor(float(variant.score_scale), _factors(num_keys, partition))


def _factors(num_keys: Tensor, partition: Partition) -> Tensor:
    """Return the length factors [B, N] of rows with so many keys in view [B or 1, N or 1]."""
    factors = (num_keys**-partition.variant.length_exponent).float()
    return factors.expand(partition.batch, partition.num_tokens).contiguous()

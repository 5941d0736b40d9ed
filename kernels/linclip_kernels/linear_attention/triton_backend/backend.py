"""Linear attention in Triton, forward and backward, for bidirectional and causal order.

Every column of v is a problem of its own once the scores are known. Values wider than one program's
state are computed block by block; the shares of dq and dk are added in float32.

The functions named ``_plan_*`` describe the launches of one block, for :mod:`replay`.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Chip,
    Launch,
    RowFactor,
    max_value_block,
    partition_tokens,
    to_device,
)
from linclip_kernels.linear_attention.triton_backend.replay import launch
from linclip_kernels.linear_attention.variant import Variant

__all__ = [
    "apply_state",
    "apply_state_backward",
    "backward",
    "forward",
    "sum_keys",
    "sum_keys_backward",
]

#: The stream of CUDA on which a program works if it chooses none.
_DEFAULT_STREAM = 0


_logger = logging.getLogger(__name__)


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
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    factors = _length_factors(q, initial, boundaries, variant)
    states = []
    for columns in _value_blocks(q, v.shape[-1]):
        start = None if initial is None else _columns(initial, columns)
        tensors = q, k, _block(v, columns), start, factors, _block(out, columns)
        states.append(launch(_plan_forward, tensors, variant, return_state, boundaries=boundaries))
    return out, _join(states) if return_state else None


def _plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
    variant: Variant,
    return_state: bool,
    *,
    boundaries: list[int] | None,
    chip: Chip,
) -> tuple[Tensor | None, list[Launch]]:
    plans = causal if variant.causal else bidirectional
    partition = partition_tokens(k, v.shape[-1], variant, boundaries, chip=chip)
    call = Call(q, k, v, initial, partition, _row_factor(k, factors, variant))
    state = partition.empty_states(partition.num_sequences) if return_state else None
    return state, plans.plan_forward(call, out, state)


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
    grad = torch.zeros_like(v) if grad is None else grad
    blocks = _value_blocks(q, v.shape[-1])
    d_q, d_k = (_GradientSum(out, blocks) for out in gradients[:2])
    factors = _length_factors(q, initial, boundaries, variant)
    d_states = []
    for columns in blocks:
        start = None if initial is None else _columns(initial, columns)
        kept = None if state is None else _columns(state, columns)
        end = None if grad_state is None else _gradient_columns(grad_state, columns)
        tensors = (
            *(q, k, _block(v, columns), start, factors, kept, _block(grad, columns), end),
            *(d_q.share(), d_k.share(), _block(gradients[2], columns)),
        )
        d_states.append(launch(_plan_backward, tensors, variant, boundaries=boundaries))
    d_q.write()
    d_k.write()
    return None if initial is None else _join_gradients(d_states)


def _plan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    factors: Tensor | None,
    state: Tensor | None,
    grad: Tensor,
    grad_state: Tensor | None,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    variant: Variant,
    *,
    boundaries: list[int] | None,
    chip: Chip,
) -> tuple[Tensor | None, list[Launch]]:
    plans = causal if variant.causal else bidirectional
    partition = partition_tokens(k, v.shape[-1], variant, boundaries, chip=chip)
    call = Call(q, k, v, initial, partition, _row_factor(k, factors, variant))
    return plans.plan_backward(call, state, grad, grad_state, (d_q, d_k, d_v))


def sum_keys(k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """Return the state of all keys, [B, H, D + 1, Dv + 1]; there may be none."""
    batch, num_tokens, heads, key_dim = k.shape
    if num_tokens == 0:
        return k.new_zeros(batch, heads, key_dim + 1, v.shape[-1] + 1, dtype=torch.float32)
    blocks = _value_blocks(k, v.shape[-1])
    return _join([launch(_plan_sum, (k, _block(v, columns)), variant) for columns in blocks])


def _plan_sum(
    k: Tensor, v: Tensor, variant: Variant, *, boundaries: None, chip: Chip
) -> tuple[Tensor, list[Launch]]:
    partition = partition_tokens(k, v.shape[-1], variant, boundaries, chip=chip)
    state = partition.empty_states(partition.num_sequences)
    call = Call(None, k, v, None, partition, _row_factor(k, None, variant))
    return state, bidirectional.plan_state(call, state)


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
        end = _gradient_columns(grad_state, columns)
        tensors = k, _block(v, columns), end, d_k_sum.share(), _block(d_v, columns)
        launch(_plan_sum_backward, tensors, variant)
    d_k_sum.write()
    return d_k, d_v


def _plan_sum_backward(
    k: Tensor,
    v: Tensor,
    grad_state: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    variant: Variant,
    *,
    boundaries: None,
    chip: Chip,
) -> tuple[None, list[Launch]]:
    partition = partition_tokens(k, v.shape[-1], variant, boundaries, chip=chip)
    call = Call(None, k, v, None, partition, _row_factor(k, None, variant))
    return None, [bidirectional.plan_state_backward(call, grad_state, d_k, d_v)]


def apply_state(q: Tensor, state: Tensor, variant: Variant) -> Tensor:
    """Return o [B, N, H, Dv] of queries that all see ``state`` [B, H, D + 1, Dv + 1]."""
    out = torch.empty(*q.shape[:-1], state.shape[-1] - 1, dtype=q.dtype, device=q.device)
    if q.shape[1] == 0:
        return out
    factors = _state_factors(q, state, variant)
    for columns in _value_blocks(q, out.shape[-1]):
        tensors = q, _columns(state, columns), factors, _block(out, columns)
        launch(_plan_apply, tensors, variant)
    return out


def _plan_apply(
    q: Tensor,
    state: Tensor,
    factors: Tensor | None,
    out: Tensor,
    variant: Variant,
    *,
    boundaries: None,
    chip: Chip,
) -> tuple[None, list[Launch]]:
    partition = partition_tokens(q, out.shape[-1], variant, boundaries, chip=chip)
    call = Call(q, None, None, None, partition, _row_factor(q, factors, variant))
    return None, [bidirectional.plan_apply(call, state, out)]


def apply_state_backward(
    q: Tensor, state: Tensor, variant: Variant, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and of the state from that of o."""
    if q.shape[1] == 0:
        return q.new_empty(q.shape), state.new_zeros(state.shape)
    blocks = _value_blocks(q, grad.shape[-1])
    factors = _state_factors(q, state, variant)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_q_sum, d_states = _GradientSum(d_q, blocks), []
    for columns in blocks:
        tensors = q, _columns(state, columns), factors, _block(grad, columns), d_q_sum.share()
        d_states.append(launch(_plan_apply_backward, tensors, variant))
    d_q_sum.write()
    return d_q, _join_gradients(d_states)


def _plan_apply_backward(
    q: Tensor,
    state: Tensor,
    factors: Tensor | None,
    grad: Tensor,
    d_q: Tensor,
    variant: Variant,
    *,
    boundaries: None,
    chip: Chip,
) -> tuple[Tensor, list[Launch]]:
    partition = partition_tokens(q, grad.shape[-1], variant, boundaries, chip=chip)
    call = Call(q, None, None, None, partition, _row_factor(q, factors, variant))
    d_state = partition.empty_states(partition.num_sequences)
    return d_state, bidirectional.plan_apply_backward(call, state, grad, d_q, d_state)


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


def _value_blocks(x: Tensor, value_dim: int) -> tuple[slice, ...]:
    return _blocks(x.shape[-1], value_dim, x.dtype, x.device)


@lru_cache
def _blocks(
    key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[slice, ...]:
    keys = torch.empty(key_dim, dtype=dtype, device="meta")
    block = max_value_block(keys, Chip.of(device))
    blocks = tuple(slice(i, min(i + block, value_dim)) for i in range(0, value_dim, block))
    if len(blocks) > 1:
        _logger.warning(
            "linear attention: heads of %d with values of %d in %s are computed in %d passes over "
            "queries and keys, each for %d columns of the values; bfloat16 heads of 64 take one",
            *(key_dim, value_dim, dtype, len(blocks), block),
        )
    return blocks


def _block(x: Tensor, columns: slice) -> Tensor:
    """Return a block of values, which is often all of them."""
    return x if columns.stop - columns.start == x.shape[-1] else x[..., columns]


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


def _row_factor(x: Tensor, factors: Tensor | None, variant: Variant) -> RowFactor:
    """Return the factors of the rows of an unnormalised variant, and of products of q and k."""
    scale = float(variant.score_scale)
    if variant.needs_length_factors and factors is None:  # every row sees all N keys
        scale *= x.shape[1] ** -variant.length_exponent
    return RowFactor(scale, float(variant.qk_scale), factors)


def _length_factors(
    q: Tensor, initial: Tensor | None, boundaries: list[int] | None, variant: Variant
) -> Tensor | None:
    """Return the length factors of the sequences [S], of rows [B, N] if causal; None: all equal."""
    if not variant.needs_length_factors:
        return None
    batch, num_tokens = q.shape[0], q.shape[1]
    if boundaries is None and initial is None:
        return _causal_factors(q, variant) if variant.causal else None
    starts = to_device(boundaries or [0, num_tokens], q.device)
    lengths = starts.diff()
    num_keys = lengths.double().view(-1, 1)  # [S or 1, 1]
    before = -starts[:-1].double().view(-1, 1)  # keys before token 0 of the batch entry
    if initial is not None:
        num_keys, before = (x + initial[:, 0, 0, -1:] for x in (num_keys, before))
    if not variant.causal:
        return _factors(num_keys, variant).view(-1)
    if boundaries is not None:
        before = before.repeat_interleave(lengths, dim=0, output_size=num_tokens).mT
    place = torch.arange(1, num_tokens + 1, dtype=torch.float64, device=q.device)
    return _factors((place + before).expand(batch, -1), variant)


def _state_factors(q: Tensor, state: Tensor, variant: Variant) -> Tensor | None:
    """Return the length factors [B] of queries that see the keys of a state."""
    if not variant.needs_length_factors:
        return None
    return _factors(state[:, 0, 0, -1].double(), variant)


def _factors(num_keys: Tensor, variant: Variant) -> Tensor:
    """Return the length factors of rows with so many keys in view."""
    return (num_keys**-variant.length_exponent).float().contiguous()


def _causal_factors(q: Tensor, variant: Variant) -> Tensor:
    """Return the length factors of rows that see 1 to N keys, [B, N], often from a cache."""
    kind = q.shape[0], q.shape[1], variant, q.device
    # On another stream a kept table might not be filled yet. CUDA graphs are captured, and before
    # that warmed up, on other streams: in memory that is theirs, and that nothing else may keep.
    is_cuda = q.device.type == "cuda"
    if is_cuda and torch.cuda.current_stream(q.device).cuda_stream != _DEFAULT_STREAM:
        return _make_causal_factors(*kind)
    return _kept_causal_factors(*kind)


def _make_causal_factors(
    batch: int, num_tokens: int, variant: Variant, device: torch.device
) -> Tensor:
    num_keys = torch.arange(1, num_tokens + 1, dtype=torch.float64, device=device)
    return _factors(num_keys.expand(batch, -1), variant)


_kept_causal_factors = lru_cache(16)(_make_causal_factors)

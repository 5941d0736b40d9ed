"""Context parallelism: communication between ranks that hold different tokens of the same images.

Every rank of a context group holds consecutive tokens of the same images, and all parameters.
Operations on single tokens need no communication. Bidirectional linear attention needs the sum of
one state per layer, whose size does not depend on the number of tokens:

    state = sum_over_ranks(linear_attention_state(k, v), group)
    o = linear_attention_from_state(q, state)

The loss is the mean, over all data and context ranks, of the value that each rank computes, and the
engine averages gradients over the same ranks. The functions here are linear, and the backward of
each is its adjoint with respect to the sum over all ranks: <f(x), g> = <x, f'(g)>, both summed over
ranks. So a rank's backward gives the gradient, with respect to its own copy of the parameters, of
the sum of all ranks' values, and the average over copies is the gradient of the loss: no further
factor is needed.

Every rank must take part in every call and in its backward: a rank without tokens keeps its empty
tensors in the graph.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce

__all__ = ["first_token", "sum_over_ranks", "token_slice"]


def token_slice(num_tokens: int, rank: int, size: int) -> slice:
    """Return the consecutive tokens of an image that a rank of a context group of ``size`` ranks
    holds; ranks differ by one token at most.

    The first ranks have the larger shares, so that rank 0 has the first token; later ranks may have
    none.

    Raises:
        ValueError: when ``rank`` is not in the group.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank ({rank}) must be in 0..size - 1 ({size - 1})")
    share, left_over = divmod(num_tokens, size)
    start = rank * share + min(rank, left_over)
    return slice(start, start + share + (rank < left_over))


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of all ranks' ``x``: one all-reduce in the forward and one in the backward.

    Args:
        x: A tensor of the same shape on all ranks, which requires a gradient on all or on none.
        group: The context group; with one rank, or None, ``x`` itself is returned.
    """
    if group is None or group.size() == 1:
        return x
    return _SumOverRanks.apply(x, group)


def first_token(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the first token of the images, which rank 0 holds, on every rank.

    Args:
        x: This rank's tokens [B, n, W]; n differs between ranks, and is at least 1 on rank 0.
        group: The context group; with one rank, or None, the token is taken from ``x``.

    Returns:
        The token [B, W]. In the backward its gradients are summed over ranks on rank 0.
    """
    if group is None or group.size() == 1:
        return x[:, 0]
    # On other ranks this is the sum of no tokens: zeros that are part of the graph. A broadcast
    # would break the graph of torch.compile.
    own = x[:, : int(group.rank() == 0)].sum(1)
    return sum_over_ranks(own, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        # torch.compile takes a result that was summed in place for one without a gradient.
        found: Tensor = all_reduce(x.contiguous(), "sum", group)
        return found
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total

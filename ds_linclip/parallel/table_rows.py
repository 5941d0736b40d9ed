"""Rows of a table of parameters, with a gradient in a fixed order and without rounding between."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["take_rows"]


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]``: rows [..., W] of a table [R, W] for indices [...] int64.

    The gradient of a row is summed by torch's own kernel also under torch.compile, whose generated
    code would add to memory atomically: in no fixed order and, in bf16, rounded after every term,
    of which a row of a vocabulary has thousands.
    """
    if not torch.compiler.is_compiling():
        return table[index]
    found: Tensor = _TakeRows.apply(table, index)
    return found


@torch.library.custom_op("linclip::sum_rows", mutates_args=())
def _sum_rows(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum values [..., W] by their row: [num_rows, W]."""
    total = values.new_zeros(num_rows, values.shape[-1])
    return total.index_put_((index,), values, accumulate=True)


@_sum_rows.register_fake
def _(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return values.new_empty(num_rows, values.shape[-1])


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = table.shape[0]
        return table[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _sum_rows(grad, index, ctx.num_rows), None

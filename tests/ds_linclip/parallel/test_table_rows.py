"""Rows of a table: values and gradients of plain indexing, compiled and not."""

import pytest
import torch
from torch import Tensor

from ds_linclip.parallel.table_rows import take_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_indexing_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator).to(dtype)
    index = torch.randint(0, 4, (2, 300), generator=generator)  # a row is met often, one never
    grad = torch.randn(2, 300, 3, generator=generator).to(dtype)

    def run(function: object) -> tuple[Tensor, Tensor]:
        leaf = table.clone().requires_grad_()
        rows = function(leaf, index)  # type: ignore[operator]
        rows.backward(grad)
        assert leaf.grad is not None
        return rows, leaf.grad

    expected = run(lambda table, index: table[index])
    torch.compiler.reset()
    for function in (take_rows, torch.compile(take_rows, fullgraph=True, backend="aot_eager")):
        assert all(map(torch.equal, run(function), expected))

"""Rows of a table: values and gradients of plain indexing, compiled and not."""

import pytest
import torch
from torch import Tensor

from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.table_rows import take_rows
from ds_linclip.parallel.tensor_parallel import vocab_parallel_embedding


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


def test_ids_outside_of_the_table_are_refused_by_compiled_embeddings_too() -> None:
    """Zeros are right for rows that another rank holds, and only for them."""
    embedding = vocab_parallel_embedding(Mesh.create(), 10, 3, init=torch.nn.init.normal_)
    torch.compiler.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[1, 9], [0, 3]])
    for function in (embedding, compiled):
        assert torch.equal(function(ids), embedding.weight[ids])
        with pytest.raises(IndexError, match="out of"):
            function(ids + 1)

"""Kinds that hand their joint projection to the operator as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_linclip.config import DepthwiseLocal, InlineAttention, LinearAttention
from ds_linclip.parallel.mesh import Mesh
from helpers.attention_layers import make_layer

KINDS = {
    "linear": LinearAttention(),
    "linear-quotient": LinearAttention(normalized=True),
    "inline": InlineAttention(),
}


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def gradients_of(layer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_projection_gets_one_packed_gradient(mesh, name, causal):
    layer = make_layer(mesh, KINDS[name], causal=causal)
    x = torch.randn(2, 20, 64, requires_grad=True)
    with Operators() as ran:
        found = layer(x)
        gradients = gradients_of(layer, x, found)
    assert "linclip::linear_attention_packed_backward" in ran.names
    assert not {"aten::stack", "aten::cat"} & ran.names
    q, k, v = layer.project(x)
    plain = layer.out_proj(layer.attend(q, k, v).flatten(2))
    assert torch.equal(found, plain)
    assert all(map(torch.equal, gradients, gradients_of(layer, x, plain)))


def test_values_that_a_local_part_takes_too_come_unpacked(mesh):
    layer = make_layer(mesh, InlineAttention(local=DepthwiseLocal(size=3)), causal=True)
    x = torch.randn(2, 20, 64, requires_grad=True)
    with Operators() as ran:
        layer(x)
    assert "linclip::linear_attention" in ran.names
    assert "linclip::linear_attention_packed" not in ran.names

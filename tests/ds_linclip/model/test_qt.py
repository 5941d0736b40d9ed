"""QT-ViT's attention: known values, and rows for which its maps have no direction."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_linclip.config import QtAttention
from ds_linclip.parallel.mesh import Mesh
from helpers import attention_layers
from linclip_kernels.linear_attention.reference import relative_rms


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def make_layer(mesh: Mesh, width: int = 64, heads: int = 4, **settings: Any) -> Any:
    made = QtAttention(**settings)
    return attention_layers.make_layer(mesh, made, width=width, heads=heads).double()


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None]  # [B, N, H, D]


def test_two_keys_have_the_known_weights(mesh):
    layer = make_layer(mesh, 2, 1)
    q, k = rows((3, 4), (-3, -4)), rows((3, 4), (4, 3))
    v = rows((1, 0), (0, 1))
    score = torch.tensor([2, 1.854599], dtype=torch.float64)
    # Signs do not count: the second query has the weights of the first.
    expected = (score / score.sum()).expand(1, 2, 1, 2).transpose(1, 2).reshape(1, 2, 1, 2)
    torch.testing.assert_close(layer.attend(q, k, v), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("x", [-30.0, -1.0, 0.0, 2.0])
def test_the_full_form_has_the_score_of_the_paper(mesh, x):
    layer = make_layer(mesh, 4, 1, form="full")
    q, k = rows((1, 0, 0, 0), (0, 0, 0, 0)), rows((2 * x, 5, 1, 1), (0, 3, 0, 0))
    o = layer.attend(q, k, rows((1, 0, 0, 0), (0, 1, 0, 0)))
    score = 1 + x + x**2 / 2  # against 1 of the second key
    torch.testing.assert_close(o[0, 0, 0, 0].item(), score / (score + 1))
    torch.testing.assert_close(o[0, 1, 0, 0].item(), 0.5)


@pytest.mark.parametrize(("size", "least", "most"), [(16, 0.002, 0.02), (64, 0.05, 0.5)])
def test_the_full_form_cancels_in_bfloat16_where_products_are_large(mesh, size, least, most):
    """Keys at right angles to all queries, with |q| |k| / sqrt(D) = size."""
    layer, q, k = make_layer(mesh, 64, 1, form="full"), *torch.randn(2, 1, 50, 1, 64)
    q[..., 32:], k[..., :32] = 0, 0
    turn = torch.linalg.qr(torch.randn(64, 64))[0]
    q, k = (((8 * size) ** 0.5 * nn.functional.normalize(x, dim=-1) @ turn) for x in (q, k))
    inputs = [x.bfloat16() for x in (q, k, torch.randn(1, 50, 1, 64))]
    exact = layer.attend(*(x.double() for x in inputs))
    assert least < relative_rms(layer.attend(*inputs), exact) < most
    assert relative_rms(layer.attend(*(x.float() for x in inputs)), exact) < 1e-4


@pytest.mark.parametrize("form", ["compact", "full"])
def test_rows_of_zeros_give_the_mean_and_finite_gradients(mesh, form):
    layer = make_layer(mesh, form=form)
    q, k, v = torch.randn(3, 1, 7, 4, 16, dtype=torch.float64).unbind()
    q[:, 3], k[:, 2] = 0, 0
    q, k = q.requires_grad_(), k.requires_grad_()
    o = layer.attend(q, k, v)
    torch.testing.assert_close(o[:, 3], v.mean(1))
    o.square().sum().backward()
    for each in (q, k):
        assert each.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1, 1e4])
def test_the_compact_score_does_not_depend_on_the_length_of_rows(mesh, scale):
    layer = make_layer(mesh)
    q, k, v = torch.randn(3, 1, 7, 4, 16, dtype=torch.float64).unbind()
    assert relative_rms(layer.attend(scale * q, k, v), layer.attend(q, k, v)) <= 1e-3


def test_a_constant_of_zero_leaves_a_finite_output(mesh):
    layer = make_layer(mesh)
    nn.init.zeros_(layer.constant)
    q, k, v = torch.randn(3, 1, 7, 4, 16, dtype=torch.float64).unbind()
    k[..., 8:], q[..., :8] = 0, 0  # all cosines of squares are 0
    torch.testing.assert_close(layer.attend(q, k, v), v.mean(1, keepdim=True).expand_as(v))
    assert layer.float().attend(*(x.float() for x in (q, k, v))).isfinite().all()


def test_the_value_part_starts_as_gelu_and_adds_nothing_after_softmax(mesh):
    layer = make_layer(mesh, value_part=True)
    o, v = torch.randn(2, 1, 7, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(layer.finish(o, v, v, None), o + nn.functional.gelu(v))
    layer.start_from_softmax()
    assert torch.equal(layer.finish(o, v, v, None), o)

"""FAST: its token form is Eq. 4, its max form keeps the differences in length within a sequence."""

import pytest
import torch

from ds_linclip.config import FastAttention, LinearAttention
from ds_linclip.parallel.mesh import Mesh
from helpers.attention_layers import make_layer


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("order", "feature_map"), [(1, "affine"), (2, "quadratic")])
def test_the_token_form_is_the_normalized_linear_kind(mesh, order, feature_map, causal):
    fast = make_layer(mesh, FastAttention(order=order), causal=causal)
    settings = LinearAttention(feature_map=feature_map, normalized=True)
    linear = make_layer(mesh, settings, causal=causal)
    x = torch.randn(2, 9, 64)
    assert torch.equal(fast(x), linear(x))


def test_lengths_count_relative_to_the_longest_of_a_head_and_sequence(mesh):
    layer = make_layer(mesh, FastAttention(qk_norm="max")).double()
    q, k, v = torch.randn(3, 2, 9, 4, 16, dtype=torch.float64).unbind()
    o = layer.attend(q, k, v)
    factors = torch.rand(2, 1, 4, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(layer.attend(factors * q, k / factors, v), o, rtol=1e-5, atol=1e-5)
    shorter = q.clone()
    shorter[:, 5] /= 2
    assert not torch.allclose(layer.attend(shorter, k, v)[:, 5], o[:, 5], rtol=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_a_sequence_of_zeros_gives_the_mean(mesh, order):
    layer = make_layer(mesh, FastAttention(order=order, qk_norm="max"))
    q, k = torch.zeros(2, 1, 9, 4, 16).requires_grad_().unbind()
    v = torch.randn(1, 9, 4, 16)
    o = layer.attend(q, k, v)
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(v))
    gradients = torch.autograd.grad(o.square().sum(), [q, k])
    assert all(each.isfinite().all() for each in gradients)

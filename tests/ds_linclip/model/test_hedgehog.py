"""Hedgehog's feature map: known values, and what it is before training."""

from typing import Any

import pytest
import torch

from ds_linclip.config import HedgehogAttention
from ds_linclip.model.attention.hedgehog import Attention
from ds_linclip.parallel.mesh import Mesh
from helpers.attention_layers import make_layer
from linclip_kernels.linear_attention.reference import relative_rms


@pytest.fixture(scope="module")
def layer() -> Any:
    return make_layer(Mesh.create(), HedgehogAttention()).double()


def test_maps_of_queries_and_of_keys_begin_as_the_identity(layer):
    for matrices in (layer.query_map, layer.key_map):
        assert torch.equal(matrices, torch.eye(16).expand(4, 16, 16))
    layer.start_from_softmax()
    assert torch.equal(layer.query_map, torch.eye(16).expand(4, 16, 16))


def test_zero_queries_give_the_mean_of_values(layer):
    k, v = torch.randn(2, 2, 7, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        found = layer.attend(torch.zeros_like(k), k, v)
    assert relative_rms(found, v.mean(1, keepdim=True).expand_as(v)) <= 1e-12


def test_a_key_along_one_entry_has_a_known_score(layer):
    """softmax([a, 0, ...]) is e^a / (e^a + D - 1) at one entry and 1 / (e^a + D - 1) at others."""
    a, others = 3.0, 15
    q = torch.zeros(1, 2, 4, 16, dtype=torch.float64)
    q[..., 0] = a
    k = q * torch.tensor([1.0, -1.0])[None, :, None, None]
    v = torch.zeros_like(q)
    v[:, 0] = 1  # so that the output is the weight of the first key
    e = torch.tensor(a, dtype=torch.float64).exp()
    up, down = e + others, 1 / e + others
    same = (e**2 + others) / up**2 + (1 / e**2 + others) / down**2
    opposite = 2 * (1 + others) / (up * down)
    with torch.no_grad():
        found = layer.attend(q, k, v)
    torch.testing.assert_close(
        found, (same / (same + opposite)).expand_as(found), rtol=1e-12, atol=0
    )


def test_weights_grow_with_the_product_of_query_and_key(layer):
    """The monotonicity that the paper wants, along one direction."""
    torch.manual_seed(1)
    direction = torch.randn(16, dtype=torch.float64)
    k = direction * torch.linspace(-1, 1, 9, dtype=torch.float64)[None, :, None, None]
    k = k.expand(1, 9, 4, 16)
    with torch.no_grad():
        identity = torch.eye(9, dtype=torch.float64)[None, :, None].expand(1, 9, 4, 9)
        weights = layer.attend(direction.expand_as(k), k, identity)[0, 0, 0]
    assert (weights.diff() > 0).all()


def test_cost_includes_both_maps():
    cost = Attention.flops(HedgehogAttention(), 64, 197, causal=True)
    assert cost == 4 * 64**2 + 4 * 128 * 64
    assert Attention.num_state_values(HedgehogAttention(), 64) == (128 + 1) * (64 + 1)

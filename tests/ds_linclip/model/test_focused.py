"""Focused linear attention: known features, and rows without or far from usual values."""

import pytest
import torch
from torch import Tensor

from ds_linclip.config import FocusedAttention
from helpers.attention_layers import identity_layer

SIZE = 16


def features(x: Tensor, power: float = 3.0) -> Tensor:
    """Return the features [N, 16] of rows x [N, 16]."""
    layer = identity_layer(FocusedAttention(power=power), SIZE)
    q, k, _ = layer.prepare(x[None].double(), None)
    assert torch.equal(q, k)
    return q[0, :, 0]


def test_known_features():
    x = torch.zeros(1, SIZE)
    x[0, :3] = torch.tensor([3.0, 4.0, -5.0])
    expected = torch.zeros(1, SIZE, dtype=torch.float64)
    expected[0, :2] = 5 * torch.tensor([27.0, 64.0]) / 4825**0.5  # 27^2 + 64^2
    assert features(x).allclose(expected, atol=1e-14)


def test_features_keep_the_norm_and_at_power_one_are_relu():
    x = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0)).double()
    for power in (1.0, 1.5, 3.0, 8.0):
        assert features(x, power).norm(dim=-1).allclose(x.relu().norm(dim=-1), rtol=1e-12)
    assert features(x, 1.0).allclose(x.relu(), rtol=1e-12)


def test_a_power_separates_rows_with_different_largest_entries():
    x = torch.full((2, SIZE), 0.5)
    x[0, 0] = x[1, 1] = 1.0
    cosines = [
        torch.cosine_similarity(*features(x, power), dim=0).item() for power in (1.0, 2.0, 3.0)
    ]
    assert cosines[0] > cosines[1] > cosines[2]


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_positive_entries_give_zero_and_no_gradient(causal):
    layer = identity_layer(FocusedAttention(), SIZE, causal=causal).float()
    x = torch.randn(1, 5, SIZE, generator=torch.Generator().manual_seed(0))
    x[0, 2] = -x[0, 2].abs()
    x[0, 3] = 0
    x.requires_grad_()
    o = layer(x)
    (grad,) = torch.autograd.grad(o.square().sum(), x)
    assert not o[0, 2:4].any()
    assert grad.isfinite().all()
    everything = torch.zeros(1, 3, SIZE, requires_grad=True)
    o = layer(everything)
    (grad,) = torch.autograd.grad(o.sum(), everything)
    assert not o.any()
    assert not grad.any()


def test_features_of_tiny_and_huge_rows_are_scaled_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, SIZE, generator=generator)
    layer = identity_layer(FocusedAttention(power=6.0), SIZE).float()
    usual, *_ = layer.prepare(x[None], None)
    for scale in (1e-15, 1e15):
        found, *_ = layer.prepare(scale * x[None], None)
        assert (found / scale).allclose(usual, rtol=1e-5)

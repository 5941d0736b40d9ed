"""PolaFormer's attention: known features, signs of both halves, the gate and its cost."""

import dataclasses

import pytest
import torch

from ds_linclip.config import PolaformerAttention, VisionTower
from ds_linclip.model.attention import own_shapes
from ds_linclip.model.flops import blocks_flops
from helpers.attention_layers import identity_layer

SIZE = 32
PLAIN = PolaformerAttention(gate=False)


def test_known_features():
    x = torch.zeros(1, 1, SIZE, dtype=torch.float64)
    x[..., :3] = torch.tensor([2.0, -3.0, 0.5])
    layer = identity_layer(PLAIN, SIZE)  # The powers begin with 1 + 4 / 2.
    q, k, _ = layer.prepare(x, None)
    expected = torch.zeros(2 * SIZE, dtype=torch.float64)
    expected[[0, 2, SIZE + 1]] = torch.tensor([8.0, 0.125, 27.0]).double()
    assert q.flatten().allclose(expected)
    assert k.flatten().allclose(expected)


def test_powers_stay_between_one_and_alpha_plus_one():
    layer = identity_layer(PolaformerAttention(gate=False, alpha=3.0), SIZE)
    x = torch.full((1, 1, SIZE), 2.0, dtype=torch.float64)
    with torch.no_grad():
        layer.power.copy_(torch.linspace(-50, 50, SIZE))
    found = layer.prepare(x, None)[0].flatten()[:SIZE].log2()
    assert found[0].item() == pytest.approx(1, abs=1e-12)
    assert found[-1].item() == pytest.approx(4, abs=1e-12)
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_half_of_the_values_come_from_equal_signs_and_half_from_opposite(causal):
    x = torch.zeros(1, 3, SIZE, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([1.0, -1.0, 1.0])
    layer = identity_layer(PLAIN, SIZE, causal=causal)
    q, k, _ = layer.prepare(x, None)
    v = torch.randn(1, 3, 1, SIZE, generator=torch.Generator().manual_seed(0)).double()
    last = layer.attend(q, k, v)[0, 2, 0]
    half = SIZE // 2
    assert last[:half].allclose((v[0, 0, 0] + v[0, 2, 0])[:half] / 2)
    assert last[half:].allclose(v[0, 1, 0, half:])
    same, opposite = layer.weights(x)[0, :, 2]
    assert same.tolist() == [0.5, 0, 0.5]
    assert opposite.tolist() == [0, 1, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_partner_are_zero_with_finite_gradients(causal):
    layer = identity_layer(PLAIN, SIZE, causal=causal).float()
    x = torch.randn(1, 4, SIZE, generator=torch.Generator().manual_seed(0)).abs()
    x[0, 1] = 0
    x.requires_grad_()
    o = layer(x)
    gradients = torch.autograd.grad(o.square().sum(), [x, layer.power])
    assert all(each.isfinite().all() for each in gradients)
    assert not o[0, 1].any()  # a zero row has no partner of either sign
    assert not o[..., SIZE // 2 :].any()  # positive rows have none of opposite sign


def test_after_a_softmax_model_the_gate_is_open():
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0)).double()
    gated = identity_layer(PolaformerAttention(), SIZE, causal=True)
    plain = identity_layer(PLAIN, SIZE, causal=True)
    assert not gated(x).allclose(plain(x))
    gated.start_from_softmax()
    assert torch.equal(gated(x), plain(x))


def test_cost_of_both_halves_and_of_the_gate():
    tower = VisionTower(image_size=(16, 16), patch_size=4, width=64, layers=1, head_width=32)
    costs, sizes = {}, {}
    for name, settings in {"plain": PLAIN, "gated": PolaformerAttention()}.items():
        each = dataclasses.replace(tower, attention=settings)
        (costs[name],) = blocks_flops(each, 17)
        (sizes[name],) = own_shapes(each)
    projections = 2 * 64**2 * (4 + 2 * 4)
    assert costs["plain"] == 17 * (projections + 2 * 8 * 32**2)
    assert costs["gated"] - costs["plain"] == 17 * 2 * 64**2
    assert sizes["gated"].keys() - sizes["plain"].keys() == {"gate_weight", "gate_bias"}

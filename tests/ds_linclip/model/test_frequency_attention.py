"""Frequency attention: known values and its transforms."""

import math
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.config import FrequencyAttention
from ds_linclip.model.attention import Patches, attention_class
from ds_linclip.parallel.mesh import Mesh
from helpers import attention_layers
from helpers.attention_definitions import CASES, define
from linclip_kernels.linear_attention.reference import relative_rms

HEADS = 2
TOKENS = FrequencyAttention(axis="tokens")
GRIDS = [(1, 1), (1, 4), (5, 1), (2, 3), (4, 4), (5, 6), (7, 5)]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def make_layer(
    mesh: Mesh, settings: FrequencyAttention, *, head_dim: int = 8, causal: bool = False
) -> Any:
    """Return a layer in float64 whose own parameters have left their initial values."""
    options = {"width": HEADS * head_dim, "heads": HEADS, "is_trained": True}
    return attention_layers.make_layer(mesh, settings, causal=causal, **options).double()


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-5 * x.shape[-1])


@pytest.mark.parametrize("head_dim", [1, 2, 7, 8])
def test_features_come_back_from_streams_that_are_not_changed(mesh, head_dim):
    layer = make_layer(mesh, FrequencyAttention(), head_dim=head_dim)
    layer.norm_gain.data.fill_(1)
    layer.norm_bias.data.zero_()
    x = torch.randn(2, 5, HEADS * head_dim, dtype=torch.float64)
    streams = layer.prepare(x, None)[2]
    assert streams.shape == (2, 5, 2 * HEADS, head_dim // 2 + 1)
    back = layer.finish(streams, x, streams, None)
    torch.testing.assert_close(back, normed(layer.project(x)[2]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_tokens_come_back_from_frequencies_that_are_not_changed(mesh, grid, dropped):
    layer = make_layer(mesh, TOKENS)
    layer._attend_streams = MethodType(lambda self, r, k, v: v, layer)
    num_patches = grid[0] * grid[1]
    kept = [torch.randperm(num_patches)[: (num_patches + 1) // 2].sort()[0] for _ in range(2)]
    patches = Patches(*grid, torch.stack(kept) if dropped else None)
    v = torch.randn(2, patches.num_tokens, HEADS, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.attend(v, v, v, patches), v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["right", "paper"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_token_gets_its_value_times_that_of_frwkv(mesh, causal, side):
    layer = make_layer(mesh, FrequencyAttention(side=side), causal=causal)
    for name, value in {"bonus_gain": 0.24, "rate_gain": 0.7, "rate_bias": 0.4}.items():
        getattr(layer, name).data.fill_(value)
    layer.rate_map.data.zero_()
    r, k, v = layer.prepare(torch.randn(2, 1, HEADS * 8, dtype=torch.float64), None)
    rate = 1 / (1 + math.exp(-0.4))
    expected = 1.24 * (r * k * (1 + 0.7 * (rate - 1))).sum(-1, keepdim=True) * v
    torch.testing.assert_close(layer.attend(r, k, v), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("side", ["right", "paper"])
def test_only_the_right_side_overwrites_the_value_of_a_repeated_key(mesh, side):
    layer = make_layer(mesh, FrequencyAttention(side=side), causal=True)
    values = {"bonus_gain": 0, "removal_gain": 1, "rate_bias": 40, "decay_bias": -40}
    for name, value in values.items():
        getattr(layer, name).data.fill_(value)
    for name in ("rate_map", "decay_map"):
        getattr(layer, name).data.zero_()
    k = F.normalize(torch.randn(1, 1, 2 * HEADS, 5, dtype=torch.float64), dim=-1)
    k, v = k.expand(1, 2, -1, -1), torch.randn(1, 2, 2 * HEADS, 5, dtype=torch.float64)
    error = (layer.attend(k, k, v)[:, 1] - v[:, 1]).abs().max()
    assert error <= 1e-5 if side == "right" else error > 0.1  # 1e-6 is added to |k|^2


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("frequency")])
def test_heads_of_odd_size_follow_the_definition(mesh, name):
    case, patches = CASES[name], Patches(3, 5)
    layer = make_layer(mesh, case.settings, head_dim=7)
    x = torch.randn(2, 16, HEADS * 7, dtype=torch.float64)
    with torch.no_grad():
        found = attention_layers.before_projection(layer, x, patches)
        assert relative_rms(found, define(case, layer, x, patches)) <= 1e-9


def test_cost_of_two_streams_and_two_scans():
    def cost(settings: FrequencyAttention, *, causal: bool) -> float:
        return attention_class(settings).flops(settings, 64, 197, causal=causal)

    # Per stream, a matrix for each of two gates, and four products with the state per scan.
    assert cost(FrequencyAttention(), causal=True) == 2 * (2 * 2 + 4 * 2) * 33**2
    assert cost(FrequencyAttention(), causal=False) == 2 * (2 * 2 + 2 * 4 * 2) * 33**2
    assert cost(TOKENS, causal=False) == 2 * (2 * 2 + 4 * 2) * 64**2 * (14 * 8 + 1) / 197


@pytest.mark.parametrize("name", ["frequency", "frequency-tokens"])
def test_long_sequences_and_zero_rows_keep_single_precision(mesh, name):
    layer, patches = make_layer(mesh, CASES[name].settings), Patches(33, 31)
    x = torch.randn(1, patches.num_tokens, HEADS * 8)
    x[:, 100:200] = 0
    with torch.no_grad():
        exact = layer(x.double(), patches)
    x.requires_grad_()
    found = layer.float()(x, patches)
    assert relative_rms(found, exact) <= 1e-4
    found.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_class_token_reads_real_parts_and_changes_no_patch(mesh):
    layer, patches = make_layer(mesh, TOKENS), Patches(4, 5)
    x = torch.randn(1, 21, HEADS * 8, dtype=torch.float64)
    image = x[:, 1:].unflatten(1, (4, 5))
    # A point reflection takes the spectrum to its conjugate.
    reflected = image.flip(1, 2).roll((1, 1), (1, 2)).flatten(1, 2)
    o, other = layer(x, patches), layer(torch.cat([x[:, :1], reflected], 1), patches)
    torch.testing.assert_close(other[:, 0], o[:, 0], rtol=0, atol=1e-12)
    changed = layer(torch.cat([x[:, :1] + 1, x[:, 1:]], 1), patches)
    assert torch.equal(changed[:, 1:], o[:, 1:])
    assert relative_rms(changed[:, 0], o[:, 0]) > 0.1


@pytest.mark.parametrize("name", ["frequency", "frequency-tokens"])
def test_transforms_are_traced_with_their_gradients(mesh, name):
    layer, patches = make_layer(mesh, CASES[name].settings).float(), Patches(3, 4)
    x = torch.randn(2, 13, HEADS * 8)
    compiled = torch.compile(layer, backend="aot_eager")
    assert relative_rms(compiled(x, patches), layer(x, patches)) <= 1e-5

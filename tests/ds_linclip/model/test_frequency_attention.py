"""Frequency attention: known values, its transforms, and its heads on two ranks."""

import math
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import FrequencyAttention, ParallelConfig
from ds_linclip.model.attention import Patches, SelfAttention
from ds_linclip.model.attention.frequency import Attention
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
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
    torch.manual_seed(0)
    width = HEADS * head_dim
    init = partial(nn.init.normal_, std=2 * width**-0.5)
    layer = Attention(width, HEADS, settings, mesh, causal=causal, init_qkv=init, init_out=init)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith(("qkv", "out_proj")):
                # The same on ranks that hold different heads.
                values = torch.linspace(-1, 1, parameter.numel() * mesh.tp.size) ** 3
                part = values.view(-1, *parameter.shape[1:]).chunk(mesh.tp.size)[mesh.tp.rank]
                parameter.add_(part.view_as(parameter))
    return layer.double()


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
@pytest.mark.parametrize("head_dim", [7, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_trained_parameters_follow_the_definition(mesh, name, head_dim, causal):
    case = CASES[name]
    if causal and not case.is_causal:
        return
    layer = make_layer(mesh, case.settings, head_dim=head_dim, causal=causal)
    x = torch.randn(2, 16, HEADS * head_dim, dtype=torch.float64, requires_grad=True)
    patches = None if causal else Patches(3, 5)
    parameters = [p for n, p in layer.named_parameters() if not n.startswith("out_proj")]
    q, k, v, *more = layer.prepare(x, patches)
    results = []
    for o in (
        layer.finish(layer.attend(q, k, v, *more), x, v, patches),
        define(case, layer, x, patches),
    ):
        results.append((o, *torch.autograd.grad(o, [x, *parameters], torch.sin(o.detach() + 1))))
    for found, expected in zip(*results, strict=True):
        assert relative_rms(found, expected) <= 1e-9


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
def test_meta_tensors_and_compiled_layers(mesh, name):
    layer, patches = make_layer(mesh, CASES[name].settings).float(), Patches(3, 4)
    x = torch.randn(2, 13, HEADS * 8)
    compiled = torch.compile(layer, backend="aot_eager")
    assert relative_rms(compiled(x, patches), layer(x, patches)) <= 1e-5
    o = layer.to("meta")(x.to("meta"), patches)
    o.sum().backward()
    assert (o.device.type, o.shape) == ("meta", x.shape)


def test_a_layer_over_tokens_needs_to_know_their_places(mesh):
    with pytest.raises(ValueError, match=r"patches \(None\) must be given: attention frequency"):
        make_layer(mesh, TOKENS)(torch.randn(1, 5, HEADS * 8, dtype=torch.float64))


def run_layer(mesh: Mesh, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the output, the gradient of the input, and those of this rank's parameters."""
    layer: SelfAttention = make_layer(mesh, CASES[name].settings)
    x = torch.randn(2, 7, HEADS * 8, dtype=torch.float64, requires_grad=True)
    o = layer(x, Patches(2, 3))
    o.backward(torch.sin(o.detach()))
    assert x.grad is not None
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return o.detach(), x.grad, found


def write_results(folder: Path) -> None:
    mesh = Mesh.create(ParallelConfig(tp=2))
    results = {name: run_layer(mesh, name) for name in CASES if name.startswith("frequency")}
    torch.save(results, folder / f"{mesh.rank}.pt")
    mesh.close()


@pytest.mark.distributed
def test_heads_on_two_ranks_give_the_whole_layer(mesh, tmp_path):
    run_ranks(2, write_results, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in ranks[0]:
        o, x_grad, whole = run_layer(mesh, name)
        for found, found_x_grad, _ in (each[name] for each in ranks):
            assert relative_rms(found, o) <= 1e-12
            assert relative_rms(found_x_grad, x_grad) <= 1e-12
        for parameter, expected in whole.items():
            parts = [each[name][2][parameter] for each in ranks]
            if parameter != "out_proj.bias":
                parts = [torch.cat(parts, dim=1 if parameter == "out_proj.weight" else 0)]
            for found in parts:
                assert relative_rms(found, expected) <= 1e-11, (name, parameter)

"""Attention whose heads or tokens are split over two ranks gives the results of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_linclip.config import ParallelConfig
from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers.attention_definitions import CASES
from linclip_kernels.linear_attention.reference import relative_rms

WIDTH, HEADS, NUM_TOKENS = 32, 2, 13
HEADS_SPLIT = [
    (name, causal)
    for name in ("inline-predicted", "fast-2", "fast-1-max", "qt", "qt-full")
    for causal in (False, True)
    if CASES[name].is_causal or not causal
]
TOKENS_SPLIT = [(name, False) for name in ("inline", "fast-1", "fast-2", "qt-plain", "qt-full")]


def settings_of(name: str) -> Any:
    if name == "qt-plain":  # a local part needs all patches on a rank
        return type(CASES["qt"].settings)(value_part=True)
    return CASES[name].settings


def run_layer(name: str, mesh: Mesh, *, causal: bool) -> tuple[SelfAttention, Tensor, Tensor]:
    """Return a layer after its backward, the gradient of its input and its output."""
    settings = settings_of(name)
    torch.manual_seed(0)
    inits = {"init_qkv": nn.init.xavier_normal_, "init_out": nn.init.xavier_normal_}
    layer = attention_class(settings)(WIDTH, HEADS, settings, mesh, causal=causal, **inits).double()
    x = torch.randn(2, NUM_TOKENS, WIDTH, dtype=torch.float64)
    grad = torch.randn(x.shape, dtype=torch.float64)
    if mesh.cp.size > 1:
        own = token_slice(NUM_TOKENS, mesh.cp.rank, mesh.cp.size)
        x, grad = x[:, own], grad[:, own]
    x.requires_grad_()
    out = layer(x, None if causal else Patches(3, 4))
    out.backward(grad)
    assert x.grad is not None
    return layer, x.grad, out.detach()


def two_ranks(axis: str, cases: list[tuple[str, bool]], folder: Path) -> None:
    mesh = Mesh.create(ParallelConfig(device="cpu", **{axis: 2}))
    results = {}
    for name, causal in cases:
        layer, d_x, out = run_layer(name, mesh, causal=causal)
        gradients = {n: p.grad for n, p in layer.named_parameters()}
        results[name, causal] = gradients | {"x": d_x, "output": out}
    torch.save(results, folder / f"{mesh.rank}.pt")
    mesh.close()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found = {}
    for axis, cases in (("tp", HEADS_SPLIT), ("cp", TOKENS_SPLIT)):
        folder = tmp_path_factory.mktemp(axis)
        run_ranks(2, two_ranks, axis, cases, folder)
        found[axis] = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return found


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    assert relative_rms(found, expected) <= 1e-11, what


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "causal"), HEADS_SPLIT)
def test_split_heads(mesh, ranks, name, causal):
    layer, d_x, out = run_layer(name, mesh, causal=causal)
    for rank, results in enumerate(ranks["tp"]):
        found = results[name, causal]
        assert_near(found["x"], d_x, "x")
        assert_near(found["output"], out, "output")
        for parameter, value in layer.named_parameters():
            expected, dim = value.grad, getattr(value, "partition_dim", -1)
            if getattr(value, "tensor_model_parallel", False):
                expected = expected.chunk(2, dim)[rank]
            assert_near(found[parameter], expected, parameter)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "causal"), TOKENS_SPLIT)
def test_split_tokens(mesh, ranks, name, causal):
    layer, d_x, out = run_layer(name, mesh, causal=causal)
    first, second = (results[name, causal] for results in ranks["cp"])
    assert_near(torch.cat([first["x"], second["x"]], 1), d_x, "x")
    assert_near(torch.cat([first["output"], second["output"]], 1), out, "output")
    for parameter, value in layer.named_parameters():
        assert_near(first[parameter] + second[parameter], value.grad, parameter)

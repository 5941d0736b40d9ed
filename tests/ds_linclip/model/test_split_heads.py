"""Attention whose heads are split over two ranks gives the results of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_linclip.config import ParallelConfig
from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers.attention_definitions import CASES
from linclip_kernels.linear_attention.reference import relative_rms

WIDTH, HEADS, NUM_TOKENS = 32, 2, 13
SPLIT = [
    (name, causal)
    for name in ("window", "gated-delta", "gated-delta-plain")
    for causal in (False, True)
]


def run_layer(name: str, mesh: Mesh, *, causal: bool) -> tuple[SelfAttention, dict[str, Tensor]]:
    """Return a layer, and its output with all gradients."""
    settings = CASES[name].settings
    torch.manual_seed(0)
    inits = {"init_qkv": nn.init.xavier_normal_, "init_out": nn.init.xavier_normal_}
    layer = attention_class(settings)(WIDTH, HEADS, settings, mesh, causal=causal, **inits).double()
    x = torch.randn(2, NUM_TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x, None if causal else Patches(3, 4))
    out.backward(torch.randn(x.shape, dtype=torch.float64))
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return layer, gradients | {"x": x.grad, "output": out.detach()}


def two_ranks(folder: Path) -> None:
    mesh = Mesh.create(ParallelConfig(device="cpu", tp=2))
    results: dict[Any, Any] = {case: run_layer(case[0], mesh, causal=case[1])[1] for case in SPLIT}
    torch.save(results, folder / f"{mesh.rank}.pt")
    mesh.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tp")
    run_ranks(2, two_ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "causal"), SPLIT)
def test_split_heads(ranks, name, causal):
    layer, whole = run_layer(name, Mesh.create(ParallelConfig(device="cpu")), causal=causal)
    parameters = dict(layer.named_parameters())
    for rank, results in enumerate(ranks):
        found = results[name, causal]
        assert found.keys() == whole.keys() == {*parameters, "x", "output"}
        for what, expected in whole.items():
            parameter = parameters.get(what)
            if getattr(parameter, "tensor_model_parallel", False):
                expected = expected.chunk(2, parameter.partition_dim)[rank]
            assert relative_rms(found[what], expected) <= 1e-11, what

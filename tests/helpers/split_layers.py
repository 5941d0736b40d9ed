"""Attention layers on one rank, and with their heads or tokens split over two."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_linclip.config import ParallelConfig
from ds_linclip.model.attention import Patches
from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers.attention_definitions import CASES
from helpers.attention_layers import make_layer

__all__ = ["Result", "run_layer", "run_split"]

#: Of the 3 x 5 patches of two images.
KEPT = torch.tensor([[0, 1, 4, 5, 7, 8, 11, 12, 14], [1, 2, 3, 6, 7, 9, 10, 12, 13]])


class Result(NamedTuple):
    """Output [B, n, W] of a layer, and gradients of its input [B, n, W] and its parameters.

    Attributes:
        split: Dimension along which a parameter is split over the tensor axis.
    """

    output: Tensor
    grad_input: Tensor
    gradients: dict[str, Tensor]
    split: dict[str, int]


def run_layer(mesh: Mesh, name: str, *, causal: bool) -> Result:
    """Run the layer of one of ``CASES`` forward and backward in float64, on this rank's tokens."""
    settings = CASES[name].settings
    layer = make_layer(mesh, settings, causal=causal, is_trained=True).double()
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 2, 10, layer.width, dtype=torch.float64, generator=generator)
    held = slice(None) if causal else token_slice(10, mesh.cp.rank, mesh.cp.size)
    x = x[:, held].requires_grad_()
    o = layer(x, None if causal else Patches(3, 5, KEPT))
    o.backward(grad[:, held])
    assert x.grad is not None
    parameters = dict(layer.named_parameters())
    return Result(
        o.detach(),
        x.grad,
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()},
        {n: p.partition_dim for n, p in parameters.items() if hasattr(p, "partition_dim")},
    )


def run_split(axis: str, names: list[tuple[str, bool]], folder: Path) -> list[dict[Any, Result]]:
    """Return the results of two ranks of an axis (``tp``, ``cp``) for cases and their causality."""
    run_ranks(2, _write_results, axis, names, folder)
    return [torch.load(folder / f"{axis}-{rank}.pt", weights_only=False) for rank in range(2)]


def _write_results(axis: str, names: list[tuple[str, bool]], folder: Path) -> None:
    sizes: dict[str, Any] = {axis: 2}
    mesh = Mesh.create(ParallelConfig(**sizes))
    results = {(name, causal): run_layer(mesh, name, causal=causal) for name, causal in names}
    torch.save(results, folder / f"{axis}-{mesh.rank}.pt")
    mesh.close()

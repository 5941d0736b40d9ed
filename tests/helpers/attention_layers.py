"""Attention layers for tests, with weights that depend on a seed alone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.parallel.mesh import Mesh

__all__ = ["before_projection", "identity_layer", "leave_initial_values", "make_layer"]


def make_layer(
    mesh: Mesh,
    settings: Any,
    *,
    causal: bool = False,
    width: int = 64,
    heads: int = 4,
    seed: int = 0,
    is_trained: bool = False,
) -> Any:
    """Return a layer; ``is_trained``: with parameters of its own that have left their initial
    values, differently in every head."""
    torch.manual_seed(seed)
    init = partial(nn.init.normal_, std=2 * width**-0.5)
    kind = attention_class(settings)
    layer = kind(width, heads, settings, mesh, causal=causal, init_qkv=init, init_out=init)
    if is_trained:
        leave_initial_values(layer, mesh)
    return layer


def leave_initial_values(layer: SelfAttention, mesh: Mesh) -> None:
    """Change the parameters that softmax attention does not have, differently in every head, and
    independently of the ranks that hold them."""
    for name, parameter in layer.named_parameters():
        if name.startswith(("qkv", "out_proj")):
            continue
        shape, split = list(parameter.shape), getattr(parameter, "partition_dim", None)
        if split is not None:
            shape[split] *= mesh.tp.size
        change = torch.arange(torch.Size(shape).numel()).sin().view(shape) / 2
        if split is not None:
            change = change.chunk(mesh.tp.size, split)[mesh.tp.rank]
        with torch.no_grad():
            parameter.add_(change)


def before_projection(layer: SelfAttention, x: Tensor, patches: Patches | None) -> Tensor:
    """Return what enters the output projection, [B, N, H, D]."""
    o, v = layer.attended(x, patches)
    return layer.finish(o, x, v, patches)


def identity_layer(settings: Any, head_dim: int, *, causal: bool = False) -> Any:
    """Return a layer of one head, in float64, with queries, keys and values x for inputs x
    [B, N, head_dim]."""
    layer = make_layer(Mesh.create(), settings, causal=causal, width=head_dim, heads=1).double()
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.eye(head_dim).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(head_dim))
    return layer

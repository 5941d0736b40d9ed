"""Attention layers of one head whose queries, keys and values are the input."""

from typing import Any

import torch
from torch import nn

from ds_linclip.model.attention import SelfAttention, attention_class
from ds_linclip.parallel.mesh import Mesh

__all__ = ["identity_layer"]


def identity_layer(settings: Any, head_dim: int, *, causal: bool = False) -> SelfAttention:
    """Return a layer in float64 with queries, keys and values x for inputs x [B, N, head_dim]."""
    options = {"init_qkv": nn.init.zeros_, "init_out": nn.init.zeros_}
    kind = attention_class(settings)
    layer = kind(head_dim, 1, settings, Mesh.create(), causal=causal, **options).double()
    with torch.no_grad():
        layer.get_parameter("qkv.weight").copy_(torch.eye(head_dim).repeat(3, 1))
        layer.get_parameter("out_proj.weight").copy_(torch.eye(head_dim))
    return layer

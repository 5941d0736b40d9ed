"""Pooling of an image's tokens into the one that the features are read from."""

from functools import partial

import torch
from torch import Tensor, nn

from ds_linclip.config import VisionTower
from ds_linclip.model.attention.rows import wide_dtype
from ds_linclip.model.attention.softmax import softmax_attention
from ds_linclip.model.block import MLP, BlockInit
from ds_linclip.parallel.context_parallel import first_token, sum_over_ranks
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import column_parallel, row_parallel

__all__ = ["make_pooling"]


def make_pooling(config: VisionTower, mesh: Mesh) -> nn.Module:
    """Return the pooling of ``config``: tokens [B, N, width] to [B, width].

    With context parallelism the tokens are those of this rank, and the result is that of all.
    """
    return _POOLINGS[config.pool_type](config, mesh)


class _ClassToken(nn.Module):
    """Takes the class token."""

    def __init__(self, config: VisionTower, mesh: Mesh) -> None:
        super().__init__()
        self.group = mesh.cp.group

    def forward(self, x: Tensor) -> Tensor:
        return first_token(x, self.group)


class _Mean(nn.Module):
    """Takes the mean of the patches."""

    def __init__(self, config: VisionTower, mesh: Mesh) -> None:
        super().__init__()
        self.group = mesh.cp.group if mesh.cp.size > 1 else None
        self.first_patch = config.num_class_tokens if mesh.cp.rank == 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.first_patch :]
        if self.group is None:
            return patches.mean(1)
        own = patches.sum(1, dtype=wide_dtype(x))
        # The number of patches takes the way of their sum: no rank knows those of the others.
        num_patches = own.new_full((len(own), 1), patches.shape[1])
        total = sum_over_ranks(torch.cat([own, num_patches], dim=1), self.group)
        return (total[:, :-1] / total[:, -1:]).to(x.dtype)


class _AttentionPooling(nn.Module):
    """Attends to all patches with one learned query, then runs an MLP.

    Heads and MLP are as wide as those of a block, and split over the tensor-parallel ranks like
    them. The rows of the projection of keys and values are ordered [head, (k, v), head_dim].

    Source: MAP of Set Transformer (arXiv 1810.00825), as in SigLIP (arXiv 2303.15343).
    """

    def __init__(self, config: VisionTower, mesh: Mesh) -> None:
        super().__init__()
        width, init = config.width, BlockInit.vision()
        self.local_heads = config.heads // mesh.tp.size
        self.latent = nn.Parameter(width**-0.5 * torch.randn(width))
        self.q = column_parallel(mesh, width, width, init=init.attn_out)
        self.kv = column_parallel(mesh, width, 2 * width, init=init.attn_out)
        self.proj = row_parallel(mesh, width, width, init=init.attn_out)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        hidden = int(width * config.mlp_ratio)
        self.mlp = MLP(width, hidden, mesh, init, activation=config.activation)

    def forward(self, x: Tensor) -> Tensor:
        heads = partial(torch.unflatten, dim=-1, sizes=(self.local_heads, -1))
        q = heads(self.q(self.latent.expand(len(x), 1, -1))).transpose(1, 2)  # [B, H, 1, D]
        k, v = heads(self.kv(x)).transpose(1, 2).chunk(2, dim=-1)  # [B, H, N, D]
        o = softmax_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, 1, H * D]
        pooled = self.proj(o)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


_POOLINGS = {"tok": _ClassToken, "avg": _Mean, "map": _AttentionPooling}

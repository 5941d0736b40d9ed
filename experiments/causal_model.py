"""A causal language model of the project's own blocks, with every kind of attention by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attention.zoo import ZOO, settings_of
from ds_linclip.config import Attention
from ds_linclip.model.block import Block, BlockInit
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import vocab_parallel_embedding

__all__ = ["KINDS", "CausalModel", "ModelShape"]

#: The kinds of attention that can be causal, by name.
KINDS = {
    name: settings
    for name in ZOO
    if (settings := settings_of(name)) == settings_of(name, causal=True)
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a language model."""

    width: int
    layers: int
    heads: int
    context: int
    vocabulary: int


class CausalModel(nn.Module):
    """Token ids [B, N] int64 -> logits [B, N, vocabulary] of the token after each.

    Token embedding, learned positions, the causal blocks of the text tower with its initialization,
    a final LayerNorm, and the embedding again as the head. Every unit is initialized from a seed of
    its own, as in the towers, so that kinds of attention start from the same shared weights.

    Args:
        shape: Sizes; N is at most ``shape.context``.
        attention: Kind and settings of every block.
        mesh: A world of one process.
        seed: Seed of the weights.
    """

    def __init__(self, shape: ModelShape, attention: Attention, mesh: Mesh, *, seed: int) -> None:
        super().__init__()
        self.context = shape.context
        with _seeded(seed, unit=0):
            self.token_embedding = vocab_parallel_embedding(
                mesh, shape.vocabulary, shape.width, init=partial(nn.init.normal_, std=0.02)
            )
            positions = 0.01 * torch.randn(shape.context, shape.width)
        self.positional_embedding = nn.Parameter(positions)
        self.blocks = _build_blocks(shape, attention, mesh, seed)
        self.ln_final = nn.LayerNorm(shape.width)
        self.to(mesh.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits.

        Raises:
            ValueError: for more tokens than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"tokens ({length}) must not be more than the context: {self.context}")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # [B, N, width]
        for block in self.blocks:
            x = block(x)
        table: Tensor = self.token_embedding.get_parameter("weight")  # [vocabulary, width]
        return F.linear(self.ln_final(x), table)


def _build_blocks(shape: ModelShape, attention: Attention, mesh: Mesh, seed: int) -> nn.ModuleList:
    init = BlockInit.text(shape.width, shape.layers)
    blocks = nn.ModuleList()
    for layer in range(shape.layers):
        with _seeded(seed, unit=1 + layer):
            sizes = (shape.width, shape.heads, 4.0)
            blocks.append(Block(*sizes, attention, mesh, causal=True, init=init))
    return blocks


@contextmanager
def _seeded(seed: int, *, unit: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + unit)
        yield

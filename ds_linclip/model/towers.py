"""The image and the text tower, with open_clip's architecture and initialization.

A tower is a sequence of units: its embedding, its blocks, its head. A pipeline stage creates only
the units it holds. Every unit is initialized from its own seed, so the weights do not depend on the
split.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import TextTower, VisionTower
from ds_linclip.model.attention import Patches
from ds_linclip.model.block import Block, BlockInit
from ds_linclip.model.pooling import make_pooling
from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.table_rows import take_rows
from ds_linclip.parallel.tensor_parallel import vocab_parallel_embedding

__all__ = ["TextTransformer", "VisionTransformer", "resample_positions"]


class _Tower(nn.Module):
    """The common part of both towers: an embedding, blocks, a head.

    Args:
        layers: Number of blocks.
        units: The units that this process holds: 0 is the embedding, 1 to ``layers`` are the
            blocks, ``layers`` + 1 is the head.
        seed: Seed of unit 0; unit n has ``seed + n``.

    Attributes:
        starts_locked: Whether the first unit held here is frozen. Units are frozen from the start
            of the tower on, so its input needs no gradient.
        compute_dtype: Dtype of the projection's product, if not that of the weight.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, layers: int, units: range, seed: int) -> None:
        super().__init__()
        self.has_embedding = 0 in units
        self.has_head = layers + 1 in units
        self.starts_locked = False
        self.proj: nn.Parameter | None = None
        self.proj_bias: nn.Parameter | None = None
        self._layers = layers
        self._seed = seed
        self._held = [unit - 1 for unit in units if 1 <= unit <= layers]

    def lock(self, unlocked_groups: int) -> None:
        """Freeze all weights except those of the last groups (LiT, arXiv 2111.07991).

        Args:
            unlocked_groups: Number of groups that are trained, counted from the end as in
                open_clip: the projection; the last block with the norm and the pooling after it;
                every other block; the embedding.
        """
        num_locked = self._layers + 2 - unlocked_groups
        groups = []
        for name, parameter in self.named_parameters():
            groups.append(self._group(name))
            parameter.requires_grad_(groups[-1] >= num_locked)
        self.starts_locked = min(groups) < num_locked

    def _group(self, name: str) -> int:
        first, *rest = name.split(".")
        if first == "blocks":
            return 1 + int(rest[0])
        with_last_block = dict.fromkeys(("ln_post", "ln_final", "pool"), self._layers)
        last = with_last_block | dict.fromkeys(("proj", "proj_bias"), self._layers + 1)
        return last.get(first, 0)

    def _make_blocks(
        self, config: VisionTower | TextTower, mesh: Mesh, *, init: BlockInit
    ) -> nn.ModuleDict:
        """Create the blocks held here, named by their number in the whole tower."""
        shape = (config.width, config.heads, config.mlp_ratio)
        options: dict[str, Any] = {"causal": config.causal, "init": init}
        options |= {"activation": config.activation, "norm_eps": config.norm_eps}
        options |= {"ls_init_value": config.ls_init_value}
        blocks = nn.ModuleDict()
        attentions = config.attentions
        for index in self._held:
            with self._seeded(1 + index):
                blocks[str(index)] = Block(*shape, attentions[index], mesh, **options)
        return blocks

    def _project(self, x: Tensor) -> Tensor:
        if self.proj is None:
            return x.to(self.compute_dtype or x.dtype)
        dtype = self.compute_dtype or self.proj.dtype
        features = x.to(dtype) @ self.proj.to(dtype)
        return features if self.proj_bias is None else features + self.proj_bias.to(dtype)

    @contextmanager
    def _seeded(self, unit: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + unit)
            yield


class VisionTransformer(_Tower):
    """ViT: images ``[B, 3, H, W] -> [B, embed_dim]``, read from the class token or pooled.

    H and W may be any multiples of the patch size: the positional embeddings, one per patch of the
    configured size in row-major order, are resampled to the grid of the images. With context
    parallelism every rank runs a slice of the tokens, the first rank with any class token; all
    ranks return the features.
    """

    def __init__(
        self, config: VisionTower, embed_dim: int, mesh: Mesh, *, units: range, seed: int
    ) -> None:
        super().__init__(config.layers, units, seed)
        width = config.width
        self.patch_size = config.patch_size
        rows, columns = (side // self.patch_size for side in config.image_size)
        self.grid_size = (rows, columns)
        self.cp = mesh.cp
        self.needs_grid = any(each.needs_grid for each in config.attentions)
        self.num_class_tokens = config.num_class_tokens
        self.norms_pooled = config.norms_pooled
        scale, norm = width**-0.5, partial(nn.LayerNorm, width, eps=config.norm_eps)
        if self.has_embedding:
            with self._seeded(0):
                self.conv1 = _PatchEmbedding(width, self.patch_size, bias=not config.class_token)
                if config.class_token:
                    self.class_embedding = nn.Parameter(scale * torch.randn(width))
                self.positional_embedding = nn.Parameter(
                    scale * torch.randn(config.num_tokens, width)
                )
            self.ln_pre = nn.Identity() if config.no_ln_pre else norm()
        self.blocks = self._make_blocks(config, mesh, init=BlockInit.vision())
        if self.has_head:
            self.ln_post = norm()
            with self._seeded(config.layers + 1):
                if config.proj_type == "linear":
                    self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
                self.pool = make_pooling(config, mesh)

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Run the units held here.

        Args:
            x: Images [B, 3, H, W], or tokens [B, N, width] without the embedding.
            patches: Places of the patches to embed, or of the tokens ``x``; None: all patches of
                the images, or unknown.

        Returns:
            Features [B, embed_dim], not normalized, or tokens [B, N, width] without the head.

        Raises:
            ValueError: for images of another shape.
        """
        x = x.detach() if self.starts_locked else x
        if self.has_embedding:
            patches = self.grid(x) if patches is None else patches
            x = self._embed(x, patches)
        patches = patches if self.needs_grid else None
        for block in self.blocks.values():
            x = block(x, patches)
        return self._head(x) if self.has_head else x

    def _head(self, x: Tensor) -> Tensor:
        pooled = self.ln_post(self.pool(x)) if self.norms_pooled else self.pool(self.ln_post(x))
        return self._project(pooled)

    def grid(self, images: Tensor, kept: Tensor | None = None) -> Patches:
        """Return the patches of images [B, 3, H, W], of which only ``kept`` may remain.

        Raises:
            ValueError: for images of another shape.
        """
        sides = images.shape[2:]
        is_divided = all(side > 0 and side % self.patch_size == 0 for side in sides)
        if images.ndim != 4 or images.shape[1] != 3 or not is_divided:
            raise ValueError(
                f"images {tuple(images.shape)} must have shape [B, 3, H, W] with H and W multiples "
                f"of patch_size ({self.patch_size})"
            )
        rows, columns = (side // self.patch_size for side in sides)
        return self.places(rows, columns, kept)

    def places(self, rows: int, columns: int, kept: Tensor | None = None) -> Patches:
        """Return the places of this tower's tokens on a grid of patches."""
        return Patches(rows, columns, kept, self.num_class_tokens)

    def _embed(self, images: Tensor, patches: Patches) -> Tensor:
        rows, columns, kept, num_class = patches
        class_position, positions = self._positions(rows, columns).tensor_split([num_class])
        held = token_slice(patches.num_tokens, self.cp.rank, self.cp.size)
        first, last = max(held.start - num_class, 0), held.stop - num_class
        if kept is None:
            x, positions = self.conv1(images, slice(first, last)), positions[first:last]
        else:
            kept = kept[:, first:last]
            x, positions = self.conv1(images, kept), take_rows(positions, kept)
        x = x + positions  # [B, n, width]
        if num_class == 0:
            return self.ln_pre(x)
        class_token = (self.class_embedding + class_position).expand(x.shape[0], 1, -1)
        # Empty if another rank has the class token; all parameters still get a gradient.
        return self.ln_pre(torch.cat([class_token[:, held], x], dim=1))

    def _positions(self, rows: int, columns: int) -> Tensor:
        return resample_positions(self.positional_embedding, self.grid_size, (rows, columns))


#: Position [B] that the features of token ids [B, L] are read from, by its name in the config.
_TEXT_POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": partial(torch.argmax, dim=-1),
    "last": lambda texts: texts.new_full((len(texts),), texts.shape[1] - 1),
    "first": lambda texts: texts.new_zeros(len(texts)),
}


class TextTransformer(_Tower):
    """Transformer: token ids ``[B, L] -> [B, embed_dim]``, read from one token.

    CLIP's end-of-text token has the largest id of its vocabulary. L is at most the context length.
    Every context-parallel rank runs the whole text.
    """

    def __init__(
        self, config: TextTower, embed_dim: int, mesh: Mesh, *, units: range, seed: int
    ) -> None:
        super().__init__(config.layers, units, seed)
        width = config.width
        self.context_length = config.context_length
        self.pool_type = config.pool_type
        if self.has_embedding:
            with self._seeded(0):
                self.token_embedding = vocab_parallel_embedding(
                    mesh, config.vocab_size, width, init=partial(nn.init.normal_, std=0.02)
                )
                self.positional_embedding = nn.Parameter(
                    0.01 * torch.randn(config.context_length, width)
                )
        init = BlockInit.text(width, config.layers)
        self.blocks = self._make_blocks(config, mesh.with_whole_sequences(), init=init)
        if self.has_head:
            self.ln_final = nn.LayerNorm(width, eps=config.norm_eps)
            with self._seeded(config.layers + 1):
                self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
                if config.proj_bias:
                    self.proj_bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, texts: Tensor, x: Tensor | None = None) -> Tensor:
        """Run the units held here.

        Args:
            texts: Token ids [B, L] int64.
            x: Tokens [B, L, width], if the embedding is not held here.

        Returns:
            Features [B, embed_dim], not normalized, or tokens [B, L, width] without the head.

        Raises:
            ValueError: for texts of another shape.
        """
        if self.has_embedding:
            x = self._embed(texts)
        assert x is not None
        x = x.detach() if self.starts_locked and not self.has_embedding else x
        for block in self.blocks.values():
            x = block(x)
        if not self.has_head:
            return x
        rows = torch.arange(len(x), device=x.device)
        return self._project(self.ln_final(x[rows, _TEXT_POOLINGS[self.pool_type](texts)]))

    def _embed(self, texts: Tensor) -> Tensor:
        if texts.ndim != 2 or texts.shape[1] > self.context_length:
            raise ValueError(
                f"texts {tuple(texts.shape)} must have shape [B, L] with L at most context_length "
                f"({self.context_length})"
            )
        return self.token_embedding(texts) + self.positional_embedding[: texts.shape[1]]


def resample_positions(
    positions: Tensor, grid_size: tuple[int, int], wanted: tuple[int, int]
) -> Tensor:
    """Resample positional embeddings to another grid, bicubic, as open_clip does.

    Args:
        positions: A class token, if there is one, and patches, [N, dim], row-major.
        grid_size: (rows, columns) of ``positions``.
        wanted: (rows, columns) of the result.

    Returns:
        [N, dim] for the wanted grid; ``positions`` itself if the grids are equal.
    """
    if wanted == grid_size:
        return positions
    num_class = len(positions) - grid_size[0] * grid_size[1]
    class_position, patches = positions.tensor_split([num_class])
    grid = patches.float().T.unflatten(1, grid_size)  # [dim, rows, columns]
    grid = F.interpolate(grid[None], wanted, mode="bicubic", antialias=True, align_corners=False)[0]
    return torch.cat([class_position, grid.flatten(1).T.to(class_position.dtype)])


class _PatchEmbedding(nn.Module):
    """A linear map of square patches; its weight [width, 3, P, P] is that of a convolution, whose
    bias is optional.

    Attributes:
        compute_dtype: Dtype of product and output, if not that of the weight.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, width: int, patch_size: int, *, bias: bool) -> None:
        super().__init__()
        bound = (3 * patch_size**2) ** -0.5  # torch's default for a convolution
        weight = torch.empty(width, 3, patch_size, patch_size).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, images: Tensor, chosen: slice | Tensor) -> Tensor:
        """Embed some patches of every image: [B, 3, H, W] -> [B, n, width].

        Args:
            images: [B, 3, H, W].
            chosen: A range of the patches in row-major order, or their indices [B, n] int64.
        """
        size = self.weight.shape[-1]
        patches = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, rows, columns, P, P]
        patches = patches.permute(0, 2, 3, 1, 4, 5)
        columns = patches.shape[2]
        if isinstance(chosen, slice):
            above = chosen.start // columns
            patches = patches[:, above : -(-chosen.stop // columns)].flatten(1, 2)
            patches = patches[:, chosen.start - above * columns : chosen.stop - above * columns]
        else:
            image = torch.arange(len(images), device=images.device)[:, None]
            patches = patches[image, chosen // columns, chosen % columns]
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(patches.flatten(2).to(dtype), self.weight.flatten(1).to(dtype), bias)

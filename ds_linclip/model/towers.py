"""The image and the text tower; architecture and initial distributions are open_clip's."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import TextTower, VisionTower
from ds_linclip.model.block import Block, BlockInit
from ds_linclip.parallel.layers import vocab_parallel_embedding
from ds_linclip.parallel.mesh import Mesh

__all__ = ["TextTransformer", "VisionTransformer"]


class VisionTransformer(nn.Module):
    """ViT: images ``[B, 3, H, W] -> [B, embed_dim]``, read from the class token.

    H and W may be any multiples of the patch size: the learned positions, one per patch of the
    configured size in row-major order, are resampled to the grid of the images.
    """

    def __init__(self, config: VisionTower, embed_dim: int, mesh: Mesh) -> None:
        super().__init__()
        width = config.width
        self.patch_size = config.patch_size
        rows, columns = (side // self.patch_size for side in config.image_size)
        self.grid_size = (rows, columns)
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.mlp_ratio,
                config.attention,
                mesh,
                causal=False,
                init=BlockInit.vision(),
            )
            for _ in range(config.layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images`` [B, 3, H, W], not normalised.

        Raises:
            ValueError: for another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not _divides(self.patch_size, images):
            raise ValueError(
                f"images {tuple(images.shape)} must have shape [B, 3, H, W] with H and W multiples "
                f"of patch_size ({self.patch_size})"
            )
        x = self.conv1(images.to(self.conv1.weight.dtype))  # [B, width, H / patch, W / patch]
        positions = self._positions(x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # [B, patches, width]
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([class_token, x], dim=1) + positions)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions [1 + height * width, dim]: as learned, or bicubic on the patch grid."""
        if (height, width) == self.grid_size:
            return self.positional_embedding
        class_position, patches = self.positional_embedding.tensor_split([1])
        grid = patches.float().T.unflatten(1, self.grid_size)  # [dim, rows, columns]
        grid = F.interpolate(
            grid[None], (height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
        return torch.cat([class_position, grid.flatten(1).T.to(class_position.dtype)])


class TextTransformer(nn.Module):
    """Causal transformer: token ids ``[B, L] -> [B, embed_dim]``, read from the end-of-text token.

    End of text is the token with the largest id, as in CLIP's vocabulary. L may be anything up to
    the context length.
    """

    def __init__(self, config: TextTower, embed_dim: int, mesh: Mesh) -> None:
        super().__init__()
        width = config.width
        self.token_embedding = vocab_parallel_embedding(
            mesh, config.vocab_size, width, init=partial(nn.init.normal_, std=0.02)
        )
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.mlp_ratio,
                config.attention,
                mesh,
                causal=True,
                init=BlockInit.text(width, config.layers),
            )
            for _ in range(config.layers)
        )
        self.ln_final = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, texts: Tensor) -> Tensor:
        """Features of ``texts`` [B, L] int64, not normalised.

        Raises:
            ValueError: for another shape.
        """
        context_length = self.positional_embedding.shape[0]
        if texts.ndim != 2 or texts.shape[1] > context_length:
            raise ValueError(
                f"texts {tuple(texts.shape)} must have shape [B, L] with L at most context_length "
                f"({context_length})"
            )
        x = self.token_embedding(texts) + self.positional_embedding[: texts.shape[1]]
        for block in self.blocks:
            x = block(x)
        rows = torch.arange(x.shape[0], device=x.device)
        return self.ln_final(x[rows, texts.argmax(dim=-1)]) @ self.proj


def _divides(patch_size: int, images: Tensor) -> bool:
    height, width = images.shape[2:]
    return height > 0 and width > 0 and height % patch_size == 0 and width % patch_size == 0

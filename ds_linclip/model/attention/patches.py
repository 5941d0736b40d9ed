"""Where the tokens of an image lie."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Patches"]


class Patches(NamedTuple):
    """The places of an image's patches, which are the tokens after the class token, if any.

    Attributes:
        rows, columns: The grid of the whole image.
        kept: Ascending indices [B, K] int64, row by row, of the patches that are not dropped; None:
            none is dropped.
        num_class_tokens: Number of tokens before the patches, 0 or 1.
    """

    rows: int
    columns: int
    kept: Tensor | None = None
    num_class_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image, with any class token."""
        num_patches = self.rows * self.columns if self.kept is None else self.kept.shape[1]
        return self.num_class_tokens + num_patches

    def to_grid(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, C] as an image [B, C, rows, columns]: without the class token, and
        zero where a patch is dropped."""
        patches = x[:, self.num_class_tokens :]
        if self.kept is not None:
            whole = x.new_zeros(len(x), self.rows * self.columns, x.shape[2])
            patches = whole.scatter(1, self._index(x), patches)
        return patches.transpose(1, 2).unflatten(2, (self.rows, self.columns))

    def from_grid(self, image: Tensor) -> Tensor:
        """Return the tokens [B, N, C] of an image [B, C, rows, columns], zero for the class token:
        the inverse of :meth:`to_grid` for all other tokens."""
        patches = image.flatten(2).transpose(1, 2)
        if self.kept is not None:
            patches = patches.gather(1, self._index(patches))
        return F.pad(patches, (0, 0, self.num_class_tokens, 0))

    def coordinates(self, device: torch.device) -> Tensor:
        """Return the row and the column of every patch, [1 or B, patches, 2] int64."""
        index = torch.arange(self.rows * self.columns, device=device)[None]
        index = index if self.kept is None else self.kept
        return torch.stack([index // self.columns, index % self.columns], dim=-1)

    def _index(self, x: Tensor) -> Tensor:
        assert self.kept is not None
        return self.kept[:, :, None].expand(-1, -1, x.shape[2])

"""Softmax attention of neighbours: a window that slides over a text (arXiv 2004.05150, section
3.1), a square around every patch of an image, whose class token sees all and is seen by all."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.model.attention.base import SelfAttention
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.softmax import softmax_attention

__all__ = ["Attention"]

#: Rows and columns of a tile, of an image and of a text, unless its margin is wider than it.
_IMAGE_TILE, _TEXT_TILE = (8, 8), (1, 64)
#: How many scores of a mask over all tokens cost as much time as one score in tiles, measured on a
#: CPU, forward and backward.
_TILE_COST = 2


class Attention(SelfAttention):
    """Softmax attention over the window of every token."""

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        # Windows count in full where the border cuts them; the class token's row is a key a token.
        num_keys = settings.size if causal else (2 * settings.radius + 1) ** 2 + 2
        return 4 * head_dim * min(num_tokens, num_keys)

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Any, ...]:
        self.check_patches(patches)
        return *self.project(x), patches

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        (patches,) = more
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        window = self._window(q.shape[2], patches)
        if window.covers_the_grid:
            o = softmax_attention(q, k, v, is_causal=self.causal)
        elif (patches is None or patches.kept is None) and window.prefers_tiles:
            o = window.attend_in_tiles(q, k, v)
        else:
            o = softmax_attention(q, k, v, mask=window.mask(patches, q.device))
        return o.transpose(1, 2)

    def _window(self, num_tokens: int, patches: Patches | None) -> "_Window":
        if patches is None:
            return _Window((1, num_tokens), (0, self.settings.size - 1), (0, 0), num_class=0)
        margin = (self.settings.radius,) * 2
        return _Window((patches.rows, patches.columns), margin, margin, patches.num_class_tokens)


class _Window(NamedTuple):
    """The neighbours of tokens on a grid; a text is a grid of one row.

    Attributes:
        grid: Rows and columns.
        before, after: How many rows and columns a token sees before and after its own.
        num_class: Number of class tokens before the grid, 0 or 1.
    """

    grid: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    num_class: int

    @property
    def covers_the_grid(self) -> bool:
        """Whether every token sees all, or all before it."""
        return all(side - 1 <= margin for side, margin in zip(self.grid, self.before, strict=True))

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile. Keys are copied as often as tiles see them, so a tile is at
        least half as wide as its two margins."""
        is_image = self.num_class > 0 or self.grid[0] > 1
        least = _IMAGE_TILE if is_image else _TEXT_TILE
        height, width = (
            max(side, (before + after) // 2)
            for side, before, after in zip(least, self.before, self.after, strict=True)
        )
        return height, width

    @property
    def num_tiles(self) -> tuple[int, int]:
        """Tiles in a column and in a row of the grid; the last ones may reach beyond it."""
        (rows, columns), (height, width) = self.grid, self.tile
        return -(-rows // height), -(-columns // width)

    @property
    def extended(self) -> tuple[int, int]:
        """Rows and columns of a tile with its margin."""
        (height, width), before, after = self.tile, self.before, self.after
        return before[0] + height + after[0], before[1] + width + after[1]

    @property
    def prefers_tiles(self) -> bool:
        """Whether tiles are faster than a mask over all tokens."""
        tiles, tile, extended = (_area(x) for x in (self.num_tiles, self.tile, self.extended))
        num_scores = tiles * tile * (extended + self.num_class)
        return _TILE_COST * num_scores <= (self.num_class + _area(self.grid)) ** 2

    def mask(self, patches: Patches | None, device: torch.device) -> Tensor:
        """Return which token (column) each token (row) sees, [1 or B, 1, N, N] bool."""
        if patches is None:
            places = _places((0, 0), self.grid, device)[None]
        else:
            places = patches.coordinates(device)
        near = self._is_near(places[:, :, None], places[:, None])  # [1 or B, N, N]
        return F.pad(near, (self.num_class, 0) * 2, value=True)[:, None]

    def attend_in_tiles(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax attention [B, H, N, Dv]; all tokens of the grid are there.

        The grid is cut into tiles. The queries of a tile see keys in it and in a margin around it,
        so that time and memory grow as the number of tokens.
        """
        num_class, mask = self.num_class, self._tile_mask(q.device)
        tiles = [self._cut(q[:, :, num_class:], (0, 0), self.tile)]
        for x in (k, v):
            cut = self._cut(x[:, :, num_class:], self.before, self.extended)
            of_class = x[:, :, :num_class].flatten(0, 1).expand(len(cut), -1, -1, -1)
            tiles.append(torch.cat([of_class, cut], dim=2))
        o = self._join(softmax_attention(*tiles, mask=mask)).unflatten(0, q.shape[:2])
        if num_class == 0:
            return o
        return torch.cat([softmax_attention(q[:, :, :num_class], k, v), o], dim=2)

    def _tile_mask(self, device: torch.device) -> Tensor:
        """Return what the tokens of every tile see, [tiles, 1, queries, class token and keys]."""
        queries = _places((0, 0), self.tile, device)[:, None]  # [queries, 1, 2]
        start = -self.before[0], -self.before[1]
        keys = _places(start, self.extended, device)[None]  # [1, keys, 2]
        corners = _places((0, 0), self.num_tiles, device, self.tile)[:, None, None]
        # Queries beyond the grid see keys beyond it, for their row must not be empty.
        is_there = self._is_inside(corners + keys) | ~self._is_inside(corners + queries)
        near = self._is_near(queries, keys) & is_there
        return F.pad(near, (self.num_class, 0), value=True)[:, None]

    def _is_near(self, queries: Tensor, keys: Tensor) -> Tensor:
        return _is_within(keys - queries, (-self.before[0], -self.before[1]), self.after)

    def _is_inside(self, places: Tensor) -> Tensor:
        return _is_within(places, (0, 0), (self.grid[0] - 1, self.grid[1] - 1))

    def _cut(self, x: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the pieces of ``size`` that begin ``before`` every tile, with zeros beyond the
        grid, [tiles, B * H, tokens of a piece, D], of ``x`` [B, H, tokens of the grid, D]."""
        image = x.flatten(0, 1).unflatten(1, self.grid)  # [B * H, rows, columns, D]
        padding = [0, 0]
        for axis in (1, 0):
            reach = (self.num_tiles[axis] - 1) * self.tile[axis] + size[axis]
            padding += [before[axis], reach - before[axis] - self.grid[axis]]
        image = F.pad(image, padding)
        pieces = image.unfold(1, size[0], self.tile[0]).unfold(2, size[1], self.tile[1])
        # [B * H, tiles in a column, tiles in a row, D, height, width]
        return pieces.permute(1, 2, 0, 4, 5, 3).flatten(3, 4).flatten(0, 1)

    def _join(self, tiles: Tensor) -> Tensor:
        """Return the tokens of the grid, [B * H, n, D], of tiles [tiles, B * H, queries, D]."""
        x = tiles.unflatten(0, self.num_tiles).unflatten(3, self.tile)
        x = x.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)  # [B * H, rows, columns, D]
        return x[:, : self.grid[0], : self.grid[1]].flatten(1, 2)


def _places(
    start: tuple[int, int],
    sides: tuple[int, int],
    device: torch.device,
    steps: tuple[int, int] = (1, 1),
) -> Tensor:
    """Return row and column of the places of a rectangle, row by row, [places, 2]."""
    rows, columns = (
        start[axis] + steps[axis] * torch.arange(sides[axis], device=device) for axis in (0, 1)
    )
    return torch.cartesian_prod(rows, columns)


def _is_within(places: Tensor, first: tuple[int, int], last: tuple[int, int]) -> Tensor:
    rows, columns = places.unbind(-1)
    is_row = (first[0] <= rows) & (rows <= last[0])
    return is_row & (first[1] <= columns) & (columns <= last[1])


def _area(sides: tuple[int, int]) -> int:
    return sides[0] * sides[1]

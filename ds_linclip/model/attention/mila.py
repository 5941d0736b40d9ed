"""Linear attention of MILA (MLLA), arXiv 2405.16605: positions rotate the numerator only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import running_mean, wide_dtype, widened
from ds_linclip.parallel.context_parallel import sum_over_ranks, token_slice

__all__ = ["Attention"]


class Attention(LinearStateAttention):
    """Linear attention with phi(x) = elu(x) + 1, whose weights are R_i phi(q_i).R_n phi(k_n),
    divided by the sum of phi(q_i).phi(k_n): R rotates pairs of channels by the place of a token.

    In a text a place is the position. In an image it is a row, for one half of the pairs, and a
    column, for the other; the class token has the place (0, 0).
    """

    @classmethod
    def num_state_values(cls, settings: Any, head_dim: int) -> int:
        # And the sum of the keys' features, without rotation.
        return super().num_state_values(settings, head_dim) + head_dim

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, ...]:
        q, k, v = self.project(x)
        angles = self._angles(x, patches)
        q = recomputed(_queries, q, self._mean(k, patches), angles)
        return q, recomputed(_keys, k, angles), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        form = {"feature_map": "identity", "qk_norm": False}
        return self.sum_values(q, k, v, score_scale=1.0, length_exponent=1.0, **form)

    def _mean(self, k: Tensor, patches: Patches | None) -> Tensor:
        """Return the mean [B, N or 1, H, D] of all keys' features that a token sees."""
        if self.causal:
            return recomputed(_running_mean, k)
        assert patches is not None
        return sum_over_ranks(recomputed(_sum, k), self.cp_group) / patches.num_tokens

    def _angles(self, x: Tensor, patches: Patches | None) -> Tensor:
        """Return the angle of every token and pair of channels, [1 or B, N, 1, D / 2]."""
        self.check_patches(patches)
        if patches is None or self.causal:
            places = torch.arange(x.shape[1], device=x.device)[None, :, None]  # [1, N, 1]
        else:
            padding = (0, 0, patches.num_class_tokens, 0)
            places = F.pad(patches.coordinates(x.device), padding)  # [1 or B, N, 2]
            held = token_slice(patches.num_tokens, self.mesh.cp.rank, self.mesh.cp.size)
            places = places[:, held]
        num_frequencies = self.head_dim // (2 * places.shape[2])
        exponents = (
            torch.arange(num_frequencies, device=x.device, dtype=wide_dtype(x)) / num_frequencies
        )
        frequencies = self.settings.rotation_base**-exponents
        return (places[..., None] * frequencies).flatten(2)[:, :, None]


def _features(x: Tensor) -> Tensor:
    return F.elu(widened(x)) + 1


def _sum(k: Tensor) -> Tensor:
    return _features(k).sum(1, keepdim=True)


def _running_mean(k: Tensor) -> Tensor:
    return running_mean(_features(k))


def _keys(k: Tensor, angles: Tensor) -> Tensor:
    return _rotate(_features(k), angles).to(k.dtype)


def _queries(q: Tensor, mean: Tensor, angles: Tensor) -> Tensor:
    """Return rotated features, divided by the mean of the scores: then the sums of values need no
    division and are in the range of the values."""
    features = _features(q)
    mean_score = (features * mean).sum(-1, keepdim=True).clamp(min=1e-6)  # [B, N, H, 1]
    return (_rotate(features, angles) / mean_score).to(q.dtype)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return x [B, N, H, D], channels i and i + D / 2 rotated by angles [1 or B, N, 1, D / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

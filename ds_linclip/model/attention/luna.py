"""LUNA: linear attention with a learned feature map that all heads share, arXiv 2512.08061.

Query and key x have the features psi_l(w_i.x + b_i) / sqrt(m), l inner, for the paper's envelope
h(x) = 1. The psi_l are the outputs of one MLP of a number, with relu inside and softplus after it.
The paper has relu there too, after which many features are zero for all inputs and learn nothing.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.parameters import OwnParameter, uniform
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import wide_dtype

__all__ = ["Attention"]

#: Hidden values of the MLP that are there at once, 64 MiB in fp32. All of them are, with 16
#: directions and 64 hidden units, 32 times the size of queries and keys in bf16.
_MAX_HIDDEN = 2**24


class Attention(LinearStateAttention):
    """The operator on the features of queries and keys, which are not normalized before."""

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        local = super().own_parameters(settings, width, heads, causal=causal)
        return {**local, **_map_parameters(settings, width // heads)}

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        found: int = settings.directions * settings.channels
        return found

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        mlp = 2 * settings.hidden * (1 + settings.channels)
        features = settings.directions * (2 * head_dim + mlp)
        return 2 * features + super().flops(settings, head_dim, num_tokens, causal=causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        q, k = self.features(q, k, dtype=v.dtype)
        return self.sum_values(q, k, v, feature_map="identity", qk_norm=False, normalized=True)

    def features(self, *inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return the features [B, N, H, F] of queries or keys [B, N, H, D], in ``dtype``."""
        parameters = [self.shared(name) for name in _map_parameters(self.settings, self.head_dim)]
        found = []
        for x in inputs:
            rows = x.flatten(0, 1)  # [B * N, H, D]
            hidden_per_row = x.shape[2] * self.settings.directions * self.settings.hidden
            parts = rows.split(max(1, _MAX_HIDDEN // hidden_per_row))
            phi = torch.cat([recomputed(_features, part, dtype, *parameters) for part in parts])
            found.append(phi.unflatten(0, x.shape[:2]))
        return found


def _map_parameters(settings: Any, head_dim: int) -> dict[str, OwnParameter]:
    """Return the parameters of the feature map, in the order of :func:`_features`."""
    m, channels, hidden = settings.directions, settings.channels, settings.hidden
    of_inputs, of_hidden = uniform(1), uniform(hidden)  # torch's, for 1 and for hidden inputs
    direction = partial(nn.init.normal_, std=head_dim**-0.5)
    return {
        "directions": OwnParameter((m, head_dim), direction, split=None),
        "offsets": OwnParameter((m,), nn.init.zeros_, split=None),
        "hidden_weight": OwnParameter((hidden,), of_inputs, split=None),
        "hidden_bias": OwnParameter((hidden,), of_inputs, split=None),
        "channel_weight": OwnParameter((channels, hidden), of_hidden, split=None),
        "channel_bias": OwnParameter((channels,), of_hidden, split=None),
    }


def _features(x: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
    """Return the features [R, H, m * L] of rows [R, H, D], in ``dtype``."""
    wide = wide_dtype(x)
    x, directions, offsets, *mlp = (each.to(wide) for each in (x, *parameters))
    hidden_weight, hidden_bias, channel_weight, channel_bias = mlp
    # Biases are added apart: with ZeRO-3 DeepSpeed replaces F.linear by one that adds a bias in
    # place, to a product that recomputation may have kept.
    projected = F.linear(x, directions) + offsets  # [R, H, m]
    hidden = (projected[..., None] * hidden_weight + hidden_bias).relu()  # [R, H, m, hidden]
    psi = F.softplus(F.linear(hidden, channel_weight) + channel_bias)  # [R, H, m, L]
    return (psi.flatten(2) * len(directions) ** -0.5).to(dtype)

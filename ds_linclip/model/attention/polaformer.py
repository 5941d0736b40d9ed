"""Polarity-aware linear attention of PolaFormer, arXiv 2501.15061."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.model.attention.base import LinearStateAttention, identity_values
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import wide_dtype
from ds_linclip.parallel.tensor_parallel import sum_gradients_of_heads

__all__ = ["Attention"]


class Attention(LinearStateAttention):
    """Normalized linear attention that compares entries of equal sign for the first half of a
    head's values, and entries of opposite sign for the second."""

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        own = dict(super().own_parameters(settings, width, heads, causal=causal))
        own["power"] = OwnParameter((width,), nn.init.zeros_)
        if settings.gate:
            init = partial(nn.init.normal_, std=width**-0.5)
            own["gate_weight"] = OwnParameter((width, width), init)
            own["gate_bias"] = OwnParameter((width,), nn.init.zeros_)
        return own

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        return 2 * head_dim

    @classmethod
    def num_state_values(cls, settings: Any, head_dim: int) -> int:
        # Each half of the values has a state.
        num_values = head_dim // 2 if _is_divided(head_dim) else head_dim
        return 2 * (2 * head_dim + 1) * (num_values + 1)

    @classmethod
    def num_summed(cls, settings: Any, width: int, num_tokens: int, *, causal: bool) -> int:
        local = super().num_summed(settings, width, num_tokens, causal=causal)
        return local + settings.gate * width * num_tokens

    @classmethod
    def projection_flops(cls, settings: Any, width: int, heads: int, *, causal: bool) -> float:
        return settings.gate * 2 * width**2

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, ...]:
        q, k, v = self.project(x)
        power, alpha = self.get_parameter("power"), self.settings.alpha
        q, k = (recomputed(_by_sign, each, power, alpha) for each in (q, k))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        half = v.shape[3] // 2
        first, second = v.chunk(2, -1) if _is_divided(self.head_dim) else (v, v)
        attend = partial(self.sum_values, feature_map="identity", qk_norm=False, normalized=True)
        same = attend(q, k, first)[..., :half]
        # Positive and negative parts change places in the queries.
        opposite = attend(q.roll(self.head_dim, -1), k, second)[..., -half:]
        return torch.cat([same, opposite], -1)

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        o = super().finish(o, x, v, patches)
        if not self.settings.gate:
            return o
        weight, bias = (self.get_parameter(f"gate_{name}") for name in ("weight", "bias"))
        x = sum_gradients_of_heads(x.to(v.dtype), self.mesh)
        # The bias is added apart: with ZeRO-3 DeepSpeed replaces F.linear by one that adds it in
        # place, to a product that selective recomputation has kept.
        gate = F.linear(x, weight.to(v.dtype)) + bias.to(v.dtype)  # [B, N, H * D]
        return o * gate.unflatten(2, o.shape[2:])

    def weights(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Return the weights as if each half of a head were a head, [B, 2 * H, N, N]."""
        q, k, *_ = self.prepare(x, patches)
        both = identity_values(q).repeat(1, 1, 1, 2)  # [B, N, H, 2 * N]
        return self.attend(q, k, both).unflatten(3, (2, -1)).flatten(2, 3).transpose(1, 2)

    def start_from_softmax(self) -> None:
        super().start_from_softmax()
        if self.settings.gate:
            nn.init.zeros_(self.get_parameter("gate_weight"))
            nn.init.ones_(self.get_parameter("gate_bias"))


def _is_divided(head_dim: int) -> bool:
    """Return whether each half of the values is computed alone: the kernels need 16 of them."""
    return head_dim >= 32


def _by_sign(x: Tensor, power: Tensor, alpha: float) -> Tensor:
    """Return relu(x)^p and relu(-x)^p, [B, N, H, 2 * D], of x [B, N, H, D] and the learned numbers
    [H * D] that give p."""
    dtype = wide_dtype(x)
    exponent = 1 + alpha * power.to(dtype).sigmoid().view(x.shape[2:])
    powers = x.to(dtype).abs().pow(exponent)
    return torch.cat([powers.where(x > 0, 0), powers.where(x < 0, 0)], -1).to(x.dtype)

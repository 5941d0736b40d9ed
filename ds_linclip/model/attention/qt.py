"""QT-ViT: linear attention with a quadratic Taylor score (NeurIPS 2024), compact and in full."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import widened
from linclip_kernels.linear_attention.quadratic_map import num_quadratic_features

__all__ = ["Attention"]

#: Added to |y|^2 of rows, as by the operator, and to |y * y|^2, which is at least 1 / D for unit y.
_EPS, _EPS_OF_SQUARES = 1e-6, 1e-12
#: Smallest constant of the compact score.
_SMALLEST = 1e-4


class Attention(LinearStateAttention):
    """The operator's affine map on squared unit vectors, or its quadratic map on the vectors
    themselves, divided by the sum of scores."""

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        own = dict(super().own_parameters(settings, width, heads, causal=causal))
        ones = nn.init.ones_
        if settings.form == "compact":
            own["constant"] = OwnParameter((heads,), ones)
        if settings.value_part:
            own["value_gain"] = OwnParameter((width,), ones)
            own["value_bias"] = OwnParameter((width,), nn.init.zeros_)
        return own

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        return head_dim if settings.form == "compact" else num_quadratic_features(head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        attend = partial(self.sum_values, qk_norm=False, normalized=True)
        if self.settings.form == "full":
            scale = self.head_dim**-0.25
            return attend(q * scale, k * scale, v, feature_map="quadratic")
        # (c^2 + p(q).p(k)) / c^2: entries of p are not negative, so that scores are at least 1.
        q = recomputed(_squares, q, self.get_parameter("constant"))
        return attend(q, recomputed(_squares, k), v, feature_map="affine")

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        o = super().finish(o, x, v, patches)
        if not self.settings.value_part:
            return o
        names = "value_gain", "value_bias"
        gain, bias = (self.get_parameter(each).view(v.shape[2:]) for each in names)
        return o + F.gelu(gain * v + bias).to(o.dtype)

    def start_from_softmax(self) -> None:
        super().start_from_softmax()
        if self.settings.value_part:
            nn.init.zeros_(self.get_parameter("value_gain"))


def _squares(y: Tensor, constant: Tensor | None = None) -> Tensor:
    """Return the squares of the entries of each row's unit vector, as a unit vector, over the
    square of the constant [H] of its head."""
    wide = widened(y)
    squares = wide.square() / (wide.square().sum(-1, keepdim=True) + _EPS)
    inverse = (squares.square().sum(-1, keepdim=True) + _EPS_OF_SQUARES).rsqrt()
    squares = squares * inverse
    if constant is not None:
        squares = squares / constant[:, None].to(wide.dtype).square().clamp(min=_SMALLEST)
    return squares.to(y.dtype)

"""Linear attention with an explicit score, Eq. 4 and Eq. 7 of arXiv 2604.10064."""

from typing import Any

from ds_linclip.model.attention.base import PlainStateAttention
from linclip_kernels.linear_attention.quadratic_map import num_quadratic_features

__all__ = ["Attention"]


class Attention(PlainStateAttention):
    """The operator on L2-normalized queries and keys, with one of its feature maps."""

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        is_quadratic = settings.feature_map == "quadratic"
        return num_quadratic_features(head_dim) if is_quadratic else head_dim

    def form(self) -> dict[str, Any]:
        return {
            "feature_map": self.settings.feature_map,
            "normalized": self.settings.normalized,
            "score_scale": self.settings.score_scale,
            "length_exponent": self.settings.length_exponent,
        }

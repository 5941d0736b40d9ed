"""InLine, injective linear attention: scores minus their mean, arXiv 2412.06590.

With n keys in view, s = head_dim^-1/2 and means over these keys, the weight of a value is
(s q.k - mean(s q.k) + 1) / n. So the output is mean(v) + C^T s q with the covariance C of keys and
values, in which a constant added to the keys or to the values cancels, and row 1 of a causal
sequence is exactly v_1.
"""

from typing import Any

from ds_linclip.model.attention.base import PlainStateAttention

__all__ = ["Attention"]


class Attention(PlainStateAttention):
    """The operator's centred scores over the number of keys, on queries and keys as they are."""

    def form(self) -> dict[str, Any]:
        scale = self.head_dim**-0.5
        return {"centered": True, "normalized": True, "qk_norm": False, "qk_scale": scale}

"""InLine, injective linear attention: scores minus their mean, arXiv 2412.06590.

With n keys in view, s = head_dim^-1/2 and means over these keys, the weight of a value is
(s q.k - mean(s q.k) + 1) / n. So the output is mean(v) + C^T s q with the covariance C of keys and
values, in which a constant added to the keys or to the values cancels:

- bidirectional, C = mean((k - mean(k)) v^T), affine attention on centred keys;
- causal, n C is a sum over the keys, with each centred on its predecessors alone (Welford, 1962):
  (k_n - mean_n(k)) (v_n - mean_{n-1}(v))^T with mean_n over keys 1 to n. No large sums are
  subtracted from each other, and row 1 is exactly v_1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.model.attention.base import LinearStateAttention
from ds_linclip.model.attention.rows import running_mean, wide_dtype
from ds_linclip.parallel.context_parallel import sum_over_ranks
from linclip_kernels import linear_attention_from_state, linear_attention_state

__all__ = ["Attention"]

#: The operator divided by the number of keys, on queries and keys as they are.
_MEAN: dict[str, Any] = {"qk_norm": False, "score_scale": 1.0, "length_exponent": 1.0}


class Attention(LinearStateAttention):
    """The mean of the values, and their covariance with the keys times the scaled query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        q = q * self.head_dim**-0.5
        if self.causal:
            return self._attend_causally(q, k, v)
        if self.cp_group is None:
            k = k - k.mean(1, keepdim=True, dtype=wide_dtype(k))
            return self.sum_values(q, k.to(v.dtype), v, feature_map="affine", **_MEAN)
        state = linear_attention_state(k, v, qk_norm=False, backend=self.backend)
        state = _centred(sum_over_ranks(state, self.cp_group))
        return linear_attention_from_state(q, state, backend=self.backend, **_MEAN)

    def _attend_causally(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mean_k, mean_v = running_mean(k), running_mean(v)
        mean_before = F.pad(mean_v[:, :-1], (0, 0, 0, 0, 1, 0))  # any would do for the first
        centred = (k - mean_k).to(v.dtype), (v - mean_before).to(v.dtype)
        o = self.sum_values(q, *centred, feature_map="identity", **_MEAN)
        return (mean_v + o).to(v.dtype)


def _centred(state: Tensor) -> Tensor:
    """Return the state [B, H, D + 1, D + 1] of keys minus their mean."""
    sum_v, sum_k, num_keys = state[..., :1, :-1], state[..., 1:, -1:], state[..., :1, -1:]
    products = state[..., 1:, :-1] - sum_k * (sum_v / num_keys)
    lower = torch.cat([products, torch.zeros_like(sum_k)], dim=-1)
    return torch.cat([state[..., :1, :], lower], dim=-2)

"""The definition of linear attention: quadratic, in float64, differentiated by autograd.

Everything else in this package is measured against this file. It is written to be read, not to be
fast, and it needs N x N memory.
"""

import torch
from torch import Tensor

__all__ = ["DENOMINATOR_EPS", "NORM_EPS", "linear_attention_reference"]

#: Added to |q|^2 and |k|^2 before the inverse square root.
NORM_EPS = 1e-6
#: Smallest denominator of Eq. 4, per key.
DENOMINATOR_EPS = 1e-6


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalized: bool = False,
    qk_norm: bool = True,
    score_scale: float = 0.5,
    length_exponent: float = 0.0,
) -> Tensor:
    """Linear attention by its definition: scores 1 + q.k, an N x N matrix, float64.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        causal, normalized, qk_norm, score_scale, length_exponent: as in
            :func:`linclip_kernels.linear_attention`.

    Returns:
        [B, N, H, Dv] in float64.

    Source: arXiv 2604.10064, Eq. 4 (normalized) and Eq. 7.
    """
    return _attend(
        *(x.double() for x in (q, k, v)),
        causal=causal,
        normalized=normalized,
        qk_norm=qk_norm,
        score_scale=score_scale,
        length_exponent=length_exponent,
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalized: bool = False,
    qk_norm: bool = True,
    score_scale: float = 0.5,
    length_exponent: float = 0.0,
) -> Tensor:
    """The definition in the dtype of the inputs; only what depends on n alone is float64 first."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    if qk_norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for x in (q, k))
    scores = 1 + q @ k.mT  # [B, H, N, N]
    num_tokens = scores.shape[-1]
    num_keys = scores.new_full((num_tokens, 1), num_tokens, dtype=torch.float64)
    if causal:
        scores = scores.tril()
        num_keys = torch.ones_like(num_keys).cumsum(0)
    if normalized:
        # clamp passes no gradient to the sum where it holds it back.
        floor = (DENOMINATOR_EPS * num_keys).to(scores)
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=floor)
        # A row with one key weighs it score / score = 1, also in the limit of score 0.
        only_key = torch.eye(1, num_tokens).to(scores)
        weights = torch.where(num_keys == 1, only_key, weights)
    else:
        weights = scores * (score_scale * num_keys**-length_exponent).to(scores)
    return (weights @ v).transpose(1, 2)  # [B, N, H, Dv]

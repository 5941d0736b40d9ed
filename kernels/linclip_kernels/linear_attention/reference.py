"""The definition of linear attention: quadratic, in float64, differentiated by autograd.

Every other implementation in this package is tested against this file. It is written to be read,
not to be fast, and it needs N x N memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_kernels.linear_attention.variant import DENOMINATOR_EPS, NORM_EPS, Variant

__all__ = ["ATOL", "attend", "linear_attention_reference", "relative_rms"]

#: The error rule: relative_rms(found) <= 2 * relative_rms(the definition in the same dtype) + ATOL,
#: of output and gradients. About the rounding of the dtype's last bit, or ten of it in float32.
ATOL = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 1e-13}


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Compute linear attention by its definition: an N x N matrix of scores, in float64.

    Args:
        q, k: [B, N, H, D]; unless causal, q may have another N than k and v.
        v: [B, N, H, Dv].
        options: causal, normalized, qk_norm, feature_map, score_scale, length_exponent, qk_scale
            and centered, the arguments of :func:`linclip_kernels.linear_attention`.

    Returns:
        [B, N, H, Dv] in float64.

    Source: arXiv 2604.10064, Eq. 4 (normalized) and Eq. 7; centred scores: arXiv 2412.06590.
    """
    return attend(q.double(), k.double(), v.double(), Variant(**options))


def attend(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """Compute the definition in the dtype of the inputs, with the factors of n in float64.

    Args:
        q, k: [B, N, H, D]; unless causal, q may have another N than k and v.
        v: [B, N, H, Dv].
        variant: The variant to compute.

    Returns:
        [B, N, H, Dv].
    """
    variant = variant.without_known_sums()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    if variant.qk_norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for x in (q, k))
    num_queries, num_tokens = q.shape[2], k.shape[2]
    num_keys = q.new_full((num_queries, 1), num_tokens, dtype=torch.float64)
    if variant.causal:
        num_keys = torch.ones_like(num_keys).cumsum(0)
    scores = _scores(q, k, num_keys, variant)  # [B, H, N, N]
    scores = scores.tril() if variant.causal else scores
    if variant.normalized:
        # clamp passes no gradient to the sum where it changes it.
        floor = (DENOMINATOR_EPS * num_keys).to(scores)
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=floor)
        if variant.fixes_single_key:
            only_key = torch.eye(1, num_tokens).to(scores)
            weights = torch.where(num_keys == 1, only_key, weights)
    else:
        weights = scores * (variant.score_scale * num_keys**-variant.length_exponent).to(scores)
    return (weights @ v).transpose(1, 2)  # [B, N, H, Dv]


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """Return RMS(value - truth) / RMS(truth), or RMS(value) where the truth is zero."""
    difference = (value.double() - truth).square().mean().sqrt()
    size = truth.square().mean().sqrt()
    return (difference / size if size > 0 else difference).item()


def _scores(q: Tensor, k: Tensor, num_keys: Tensor, variant: Variant) -> Tensor:
    match variant.feature_map:
        case "relu":
            q, k = F.relu(q), F.relu(k)
        case "softplus":
            q, k = F.softplus(q), F.softplus(k)
    x = variant.qk_scale * (q @ k.mT)
    if variant.centered:
        in_view = x.tril() if variant.causal else x
        x = x - (in_view.sum(-1, keepdim=True) / num_keys).to(x)
    match variant.feature_map:
        case "affine":
            return 1 + x
        case "quadratic":
            return 1 + x + x * x / 2
        case "relu" | "softplus" | "identity":
            return x
    raise ValueError(f"feature_map ({variant.feature_map!r}) is not known")

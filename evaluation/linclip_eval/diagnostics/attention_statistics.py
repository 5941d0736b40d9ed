"""Statistics of attention matrices and of sets of tokens, to compare layers and models.

Each is about one head of one sequence. Weights are taken relative to the sum of their row, so that
attention without a denominator (arXiv 2604.10064, Eq. 7) compares with attention that has one; that
sum itself is the gain. Where weights may be negative, as those of InLine, the selectivity is that
of their absolute values, relative to the sum of these: a value that is subtracted is attended to as
well. N is the number of tokens, n_i the number of keys that row i attends to: N, or i when causal.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention_statistics", "contrast_bound", "token_similarity"]


def attention_statistics(weights: Tensor, *, causal: bool) -> dict[str, Tensor]:
    """Return how selective attention matrices are, and how large their rows.

    Contrast, variation and entropy leave out rows with a single key, which have no choice.

    Args:
        weights: [M, N, N], a row per query, and zero above the diagonal if causal.
        causal: Whether row i attends only to keys up to i.

    Returns:
        One number for each matrix, [M], by name:

        - contrast: the largest absolute weight of a row over the mean one of its keys, mean over
          rows. 1 is uniform, n_i a single key.
        - variation: the standard deviation of the absolute weights of a row over their mean, mean
          over rows. 0 is uniform.
        - entropy: the entropy of the absolute weights of a row over log n_i, mean over rows. 1 is
          uniform, 0 a single key.
        - effective_rank: exp of the entropy of the singular values of the weights with their signs,
          over N (Roy, Vetterli 2007).
        - gain: the sum of a row with its signs, mean over rows.
        - gain_variation: the standard deviation of that sum over the size of its mean.
        - negative_share: the part of the sum of absolute weights that is subtracted, mean over
          rows. 0 for kinds whose weights are not negative, 1/2 for rows whose sum is 0.
    """
    num_tokens = weights.shape[-1]
    num_keys = _num_keys(weights, causal)
    sizes = weights.abs()
    gains, totals = weights.sum(dim=-1), sizes.sum(dim=-1)  # [M, N]
    totals = totals.clamp(min=torch.finfo(weights.dtype).tiny)
    shares = sizes / totals[..., None]  # [M, N, N]
    has_choice = num_keys > 1
    squares = shares.square().sum(dim=-1) * num_keys  # [M, N]: mean square over squared mean
    rows = {
        "contrast": shares.amax(dim=-1) * num_keys,
        "variation": (squares - 1).clamp(min=0).sqrt(),
        "entropy": torch.special.entr(shares).sum(dim=-1) / num_keys.log(),
    }
    singular = torch.linalg.svdvals(weights / totals[..., None])  # [M, N]
    singular = singular / singular.sum(dim=-1, keepdim=True)
    return {
        **{name: values[:, has_choice].mean(dim=-1) for name, values in rows.items()},
        "effective_rank": torch.special.entr(singular).sum(dim=-1).exp() / num_tokens,
        "gain": gains.mean(dim=-1),
        "gain_variation": gains.std(dim=-1, correction=0) / gains.mean(dim=-1).abs(),
        "negative_share": (weights.clamp(max=0).abs().sum(dim=-1) / totals).mean(dim=-1),
    }


def contrast_bound(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """Return an upper bound of the contrast of attention with the scores 1 + cos(q, k).

    A score is at most 2, so that the largest over the mean of a row is at most 2 / (1 + its mean
    cosine): 2 where the cosines average out, more only if all keys point away from the query.

    Args:
        q, k: Queries and keys [M, N, D].
        causal: Whether row i attends only to keys up to i.

    Returns:
        The bound of each matrix, [M]: the mean over rows with more than one key.
    """
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    num_keys = _num_keys(q, causal)
    keys = k.cumsum(dim=1) if causal else k.sum(dim=1, keepdim=True)
    mean_cosines = (q * keys).sum(dim=-1) / num_keys  # [M, N]
    return (2 / (1 + mean_cosines))[:, num_keys > 1].mean(dim=-1)


def token_similarity(tokens: Tensor) -> Tensor:
    """Return the mean cosine [B] over all pairs of different tokens of each sequence [B, N, width].

    Over-smoothing drives it to 1 (arXiv 2203.05962).
    """
    num_tokens = tokens.shape[1]
    total = F.normalize(tokens, dim=-1).sum(dim=1).square().sum(dim=-1)  # [B]: all pairs
    return (total - num_tokens) / (num_tokens * (num_tokens - 1))


def _num_keys(rows: Tensor, causal: bool) -> Tensor:
    """Return the number of keys [N] of the rows [M, N, ...], in their dtype."""
    num_tokens = rows.shape[1]
    if causal:
        return torch.arange(1, num_tokens + 1).to(rows)
    return rows.new_full((num_tokens,), num_tokens)

"""Attention over random tokens: its limit for many of them, and the distance that is left.

Tokens x_n are independent with mean m and covariance C; they are the keys, their values are V x_n,
and a query is a. For normal tokens softmax attention tends to V (m + C a).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_kernels import linear_attention_from_state, linear_attention_state

__all__ = [
    "PAIRS",
    "Distance",
    "Distribution",
    "Tokens",
    "curve_of",
    "measure_distances",
    "predict_rms",
    "slope",
    "softmax_gap",
]

#: Of a token's independent entries.
Distribution = Literal["normal", "exponential", "sign"]
#: Outputs whose distance is measured, and what from. "linear": V m plus the mean of a.u V u, u = x
#: - m, which needs the true mean; "affine": the mean of (1 + a.x) V x; "inline": affine with keys
#: less their own mean.
PAIRS = (
    *(("softmax", "limit"), ("linear", "limit"), ("affine", "limit"), ("inline", "limit")),
    ("softmax", "inline"),
)
#: Numbers held at a time, at most.
CHUNK = 2**22


@dataclass(frozen=True)
class Tokens:
    """Independent tokens x = m + R e with R R^T the covariance, and e of independent entries.

    Args:
        mean: m [D].
        root: R [D, D].
        values: V [Dv, D], the map of tokens to values.
        distribution: The entries of e, of mean 0 and variance 1: standard normal, exponential
            minus 1, or -1 and 1 with equal chances.
    """

    mean: Tensor
    root: Tensor
    values: Tensor
    distribution: Distribution = "normal"

    @property
    def covariance(self) -> Tensor:
        """The covariance [D, D]."""
        return self.root @ self.root.T

    def query(self, v_squared: float) -> Tensor:
        """Return the query a [D] with a^T C a = v_squared and R^T a of equal entries."""
        ones = torch.ones_like(self.mean)
        direction = torch.linalg.solve(self.root.T, ones)
        return direction * math.sqrt(v_squared / len(ones))

    def sample(self, num_draws: int, num_tokens: int, generator: torch.Generator) -> Tensor:
        """Draw x - m [num_draws, num_tokens, D], in float64."""
        shape = num_draws, num_tokens, len(self.mean)
        if self.distribution == "normal":
            entries = torch.randn(shape, dtype=torch.float64, generator=generator)
        else:
            uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
            exponential = self.distribution == "exponential"
            entries = -torch.log1p(-uniform) - 1 if exponential else (uniform - 0.5).sign()
        return entries @ self.root.T


@dataclass(frozen=True)
class Distance:
    """A measured distance of two outputs, and the predicted one for normal tokens.

    ``rms_error`` is the standard error of ``rms``; ``gap`` the result of :func:`softmax_gap`.
    """

    output: str
    reference: str
    tokens: int
    v_squared: float
    distribution: str
    mean: float
    rms: float
    rms_error: float
    predicted: float
    gap: float


def predict_rms(
    output: str, reference: str, tokens: Tokens, query: Tensor, num_tokens: int
) -> float:
    """Compute the RMS norm of the difference of two outputs for normal tokens.

    Exact for all but softmax, for which it is of first order in 1 / num_tokens.

    Args:
        output, reference: One of ``PAIRS``. "limit" is V (m + C a).
        tokens: The distribution of tokens; its mean and covariance count.
        query: a [D].
        num_tokens: Number of tokens L.

    Source: our derivation, docs/theory.md.
    """
    step = tokens.covariance @ query
    square = (query @ step).item()
    spread = torch.trace(tokens.values @ tokens.covariance @ tokens.values.T).item()
    shift = (tokens.values @ step).square().sum().item()
    growth = math.exp(square)
    match output, reference:
        case "softmax", "limit":
            total = growth * (spread + shift)
        case "linear", "limit":
            total = square * spread + shift
        case "inline", "limit":
            total = (1 + square * (num_tokens - 1) / num_tokens) * spread + shift
        case "softmax", "inline":
            total = (growth - 1 - square) * spread + (growth - 1) * shift
        case "affine", "limit":
            centre, gain = tokens.values @ tokens.mean, 1 + (query @ tokens.mean).item()
            size, along = (centre @ centre).item(), (centre @ tokens.values @ step).item()
            total = (gain**2 + square) * spread + shift + 2 * gain * along + square * size
            total += num_tokens * (gain - 1) ** 2 * size
        case _:
            raise ValueError(f"output, reference ({output}, {reference}) must be one of {PAIRS}")
    return math.sqrt(total / num_tokens)


def softmax_gap(tokens: Tokens, query: Tensor) -> float:
    """Compute the distance of softmax attention's limit from V (m + C a) for any distribution.

    Softmax tends to V times the gradient of ln E exp(a.x), which is linear in a for normal tokens.

    Raises:
        ValueError: Softmax attention has no limit: E exp(a.x) is infinite.
    """
    scores = tokens.root.T @ query  # [D], of the independent entries
    match tokens.distribution:
        case "normal":
            return 0.0
        case "sign":
            tilted = scores.tanh()
        case "exponential":
            largest = scores.max().item()
            if largest >= 1:
                raise ValueError(f"query (R^T a up to {largest:g}) must have R^T a < 1")
            tilted = scores / (1 - scores)
    return (tokens.values @ tokens.root @ (tilted - scores)).norm().item()


def measure_distances(
    tokens: Tokens,
    queries: Sequence[Tensor],
    num_tokens: int,
    num_draws: int,
    generator: torch.Generator,
) -> list[Distance]:
    """Measure the distance of every pair of ``PAIRS`` for all queries on the same tokens.

    Args:
        tokens: The distribution of tokens.
        queries: Queries a, each [D].
        num_tokens: Number of tokens L.
        num_draws: Number of independent draws of L tokens.
        generator: The source of the tokens.
    """
    query = torch.stack(list(queries))  # [Q, D]
    limit = (tokens.mean + query @ tokens.covariance) @ tokens.values.T
    squares: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in PAIRS}
    at_once = max(1, CHUNK // (num_tokens * len(tokens.mean)))
    for first in range(0, num_draws, at_once):
        draws = min(at_once, num_draws - first)
        outputs = _attend(tokens, tokens.sample(draws, num_tokens, generator), query)
        outputs["limit"] = limit.expand(draws, -1, -1)
        for pair, found in squares.items():
            found.append((outputs[pair[0]] - outputs[pair[1]]).square().sum(-1))  # [draws, Q]
    distances = []
    for (output, reference), found in squares.items():
        errors = torch.cat(found)
        for a, error in zip(queries, errors.T, strict=True):
            rms = error.mean().sqrt().item()
            distances.append(
                Distance(
                    output=output,
                    reference=reference,
                    tokens=num_tokens,
                    v_squared=round((a @ tokens.covariance @ a).item(), 9),
                    distribution=tokens.distribution,
                    mean=tokens.mean.norm().item(),
                    rms=rms,
                    rms_error=error.std().item() / math.sqrt(num_draws) / (2 * rms),
                    predicted=predict_rms(output, reference, tokens, a, num_tokens),
                    gap=softmax_gap(tokens, a),
                )
            )
    return distances


def curve_of(
    distances: Sequence[Distance],
    output: str,
    reference: str,
    v_squared: float,
    distribution: str = "normal",
) -> list[Distance]:
    """Return the distances of one pair and query over their numbers of tokens, ascending."""
    wanted = output, reference, v_squared, distribution
    found = [
        each
        for each in distances
        if (each.output, each.reference, each.v_squared, each.distribution) == wanted
    ]
    return sorted(found, key=lambda each: each.tokens)


def slope(distances: Sequence[Distance]) -> float:
    """Compute the least-squares slope of log RMS over log tokens."""
    over = [math.log(each.tokens) for each in distances]
    return linear_regression(over, [math.log(each.rms) for each in distances]).slope


def _attend(tokens: Tokens, centred: Tensor, query: Tensor) -> dict[str, Tensor]:
    """Return outputs [draws, Q, Dv] of the attentions on x - m [draws, L, D], by their names."""
    x = centred + tokens.mean
    values, shift = x @ tokens.values.T, tokens.values @ tokens.mean
    queries = query.expand(len(x), -1, -1)
    return {
        "softmax": F.scaled_dot_product_attention(queries, x, values, scale=1),
        "linear": shift + _average(queries, centred, values - shift, "identity"),
        "affine": _average(queries, x, values, "affine"),
        "inline": _average(queries, x - x.mean(1, keepdim=True), values, "affine"),
    }


def _average(q: Tensor, k: Tensor, v: Tensor, feature_map: Literal["identity", "affine"]) -> Tensor:
    """Return the operator's mean over n of f(q.k_n) v_n [draws, Q, Dv]."""
    state = linear_attention_state(
        k[:, :, None], v[:, :, None], qk_norm=False, feature_map=feature_map
    )
    out = linear_attention_from_state(
        *(q[:, :, None], state),
        qk_norm=False,
        feature_map=feature_map,
        score_scale=1,
        length_exponent=1,
    )
    return out[:, :, 0]

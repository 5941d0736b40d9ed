"""Times over the number of tokens: how they grow, and from where on one is below another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress
from scipy.stats import t as student_t

__all__ = ["Measured", "Point", "Scaling", "Slope", "crossover", "fit_slope"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a call costs.

    Attributes:
        seconds, low, high: Median, lower and upper quartile of the runs.
        runs: How many there were.
        peak_bytes: The most that torch has allocated at once, beyond inputs and weights.
    """

    seconds: float
    low: float
    high: float
    runs: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One attention in one direction at one number of tokens: measured, or skipped for a reason."""

    what: str
    attention: str
    direction: str
    num_tokens: int
    measured: Measured | None = None
    skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Exponent of N in the time, with its 95 % interval."""

    exponent: float
    low: float
    high: float


def fit_slope(tokens: Sequence[float], seconds: Sequence[float]) -> Slope:
    """Least squares in log-log.

    Args:
        tokens: Numbers of tokens.
        seconds: Times at these.

    Returns:
        The exponent, with a t-interval from the scatter about the line.

    Raises:
        ValueError: for fewer than three numbers of tokens, or values that are not positive.
    """
    if len(set(tokens)) < 3:
        raise ValueError(f"tokens ({len(set(tokens))} different) must be at least 3 to fit a slope")
    if not all(0 < value < math.inf for value in (*tokens, *seconds)):
        raise ValueError("tokens and seconds must be positive and finite")
    fit = linregress(np.log(tokens), np.log(seconds))
    reach = student_t.ppf(0.975, len(tokens) - 2) * fit.stderr
    return Slope(
        exponent=float(fit.slope), low=float(fit.slope - reach), high=float(fit.slope + reach)
    )


def crossover(softmax: Mapping[int, float], linear: Mapping[int, float]) -> float | None:
    """Number of tokens from which on linear attention is faster, interpolated in log-log.

    Args:
        softmax, linear: Number of tokens -> seconds.

    Returns:
        The last crossing between numbers of tokens that both have; None where there is none, or
        where linear attention is slower at the largest.
    """
    lengths = sorted(softmax.keys() & linear.keys())
    gains = [math.log(softmax[n] / linear[n]) for n in lengths]
    losing = [i for i, gain in enumerate(gains) if gain <= 0]
    if not losing or losing[-1] == len(gains) - 1:
        return None
    ends = slice(losing[-1], losing[-1] + 2)
    return math.exp(float(np.interp(0.0, gains[ends], np.log(lengths[ends]))))


class Scaling:
    """The points of one measurement, and what they say together.

    Args:
        points: At least one.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)
        self.subjects = list(dict.fromkeys(point.what for point in points))
        self.directions = list(dict.fromkeys(point.direction for point in points))
        self.attentions = list(dict.fromkeys(point.attention for point in points))
        self.tokens = sorted({point.num_tokens for point in points})

    def line(self, what: str, direction: str, attention: str) -> dict[int, Measured]:
        """What was measured, by number of tokens."""
        place = what, direction, attention
        return {
            point.num_tokens: point.measured
            for point in self.points
            if (point.what, point.direction, point.attention) == place and point.measured
        }

    def seconds(self, what: str, direction: str, attention: str) -> dict[int, float]:
        """Medians, by number of tokens."""
        line = self.line(what, direction, attention)
        return {num_tokens: found.seconds for num_tokens, found in line.items()}

    def fitted(self, what: str, direction: str, attention: str) -> list[int]:
        """Where a slope is fitted: from a tenth of the largest number of tokens on.

        There the terms that do not grow are small.
        """
        lengths = sorted(self.line(what, direction, attention))
        return [n for n in lengths if 10 * n >= lengths[-1]]

    def slope(self, what: str, direction: str, attention: str) -> Slope | None:
        """Over :meth:`fitted`; None with fewer than three numbers of tokens."""
        lengths = self.fitted(what, direction, attention)
        if len(lengths) < 3:
            return None
        seconds = self.seconds(what, direction, attention)
        return fit_slope(lengths, [seconds[n] for n in lengths])

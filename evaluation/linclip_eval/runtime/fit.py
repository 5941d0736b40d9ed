"""Times over the number of tokens: their growth, and from where on one is below another."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress
from scipy.stats import t as student_t

__all__ = ["CallCost", "RuntimePoint", "Scaling", "Slope", "crossover", "fit_slope"]


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """Time and memory of one call.

    Attributes:
        seconds, low, high: Median, lower and upper quantile of the runs.
        runs: Number of runs.
        peak_bytes: Most memory that torch had allocated at once, beyond inputs and weights.
    """

    seconds: float
    low: float
    high: float
    runs: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class RuntimePoint:
    """One attention in one direction at one number of tokens: measured, or skipped for a reason."""

    what: str
    attention: str
    direction: str
    num_tokens: int
    measured: CallCost | None = None
    skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Exponent of N in the time, with its 95 % interval."""

    exponent: float
    low: float
    high: float


def fit_slope(tokens: Sequence[float], seconds: Sequence[float]) -> Slope:
    """Fit the exponent of N by least squares in log-log, with a t-interval from the scatter.

    Raises:
        ValueError: for fewer than three numbers of tokens, or values that are not positive.
    """
    if len(set(tokens)) < 3:
        raise ValueError(f"tokens ({len(set(tokens))} different) must be at least 3 to fit a slope")
    if not all(0 < value < math.inf for value in (*tokens, *seconds)):
        raise ValueError("tokens and seconds must be positive and finite")
    fit = linregress(np.log(tokens), np.log(seconds))
    slope, reach = float(fit.slope), float(student_t.ppf(0.975, len(tokens) - 2) * fit.stderr)
    return Slope(exponent=slope, low=slope - reach, high=slope + reach)


def crossover(softmax: Mapping[int, float], linear: Mapping[int, float]) -> float | None:
    """Return the number of tokens from which linear attention is faster, interpolated in log-log.

    It is the last crossing between numbers of tokens that both have; None where there is none, or
    where linear attention is slower at the largest.

    Args:
        softmax, linear: Number of tokens -> seconds.
    """
    lengths = sorted(softmax.keys() & linear.keys())
    gains = [math.log(softmax[n] / linear[n]) for n in lengths]
    losing = [i for i, gain in enumerate(gains) if gain <= 0]
    if not losing or losing[-1] == len(gains) - 1:
        return None
    ends = slice(losing[-1], losing[-1] + 2)
    return math.exp(float(np.interp(0.0, gains[ends], np.log(lengths[ends]))))


class Scaling:
    """The points of one measurement, by subject, direction and attention.

    Args:
        points: At least one.
        softmax: Names of the attentions that the others are compared with.
        fit_from: Smallest number of tokens in the fit of a slope; by default a tenth of the largest
            of each line, where the terms that do not grow are small.
    """

    def __init__(
        self,
        points: Iterable[RuntimePoint],
        *,
        softmax: Sequence[str] = ("softmax",),
        fit_from: int | None = None,
    ) -> None:
        self.points = list(points)
        self._softmax, self._fit_from = softmax, fit_from
        self.directions = list(dict.fromkeys(point.direction for point in self.points))
        self.tokens = sorted({point.num_tokens for point in self.points})
        #: Subject -> its attentions.
        self.attentions: dict[str, list[str]] = {}
        self._lines: dict[tuple[str, str, str], dict[int, CallCost]] = {}
        for point in sorted(self.points, key=lambda point: point.num_tokens):
            attentions = self.attentions.setdefault(point.what, [])
            if point.attention not in attentions:
                attentions.append(point.attention)
            if point.measured:
                place = point.what, point.direction, point.attention
                self._lines.setdefault(place, {})[point.num_tokens] = point.measured

    def linear(self, what: str) -> list[str]:
        """Return the attentions of a subject that are compared with softmax."""
        return [name for name in self.attentions[what] if name not in self._softmax]

    def line(self, what: str, direction: str, attention: str) -> dict[int, CallCost]:
        """Return what was measured, by increasing number of tokens."""
        return self._lines.get((what, direction, attention), {})

    def fastest_softmax(self, what: str, direction: str) -> dict[int, CallCost]:
        """Return the softmax attention with the shortest time, by number of tokens."""
        best: dict[int, CallCost] = {}
        for name in self._softmax:
            for num_tokens, cost in self.line(what, direction, name).items():
                best[num_tokens] = min(cost, best.get(num_tokens, cost), key=lambda c: c.seconds)
        return best

    def crossover(self, what: str, direction: str, attention: str) -> float | None:
        """Return :func:`crossover` of the fastest softmax attention and a linear one; None for one
        of softmax."""
        if attention in self._softmax:
            return None
        softmax = self.fastest_softmax(what, direction)
        return crossover(_seconds(softmax), _seconds(self.line(what, direction, attention)))

    def fitted(self, what: str, direction: str, attention: str) -> list[int]:
        """Return the numbers of tokens that a slope is fitted to."""
        line = self.line(what, direction, attention)
        smallest = self._fit_from or max(line, default=0) / 10
        return [n for n in line if n >= smallest]

    def slope(self, what: str, direction: str, attention: str) -> Slope | None:
        """Fit the slope over :meth:`fitted`; None with fewer than three numbers of tokens."""
        lengths = self.fitted(what, direction, attention)
        if len(lengths) < 3:
            return None
        line = self.line(what, direction, attention)
        return fit_slope(lengths, [line[n].seconds for n in lengths])


def _seconds(line: Mapping[int, CallCost]) -> dict[int, float]:
    return {num_tokens: cost.seconds for num_tokens, cost in line.items()}

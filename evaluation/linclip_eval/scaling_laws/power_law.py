"""Power laws over compute: the frontier of a set of runs, a fit, and its bootstrap intervals.

A law is E = beta C^alpha (arXiv 2212.07143), a straight line in the logarithms, fitted by least
squares to the compute-optimal frontier.

Intervals are 95 % percentile intervals of a two-stage bootstrap: settings are drawn, then seeds
within each. Drawing single runs instead would keep nearly every setting in every resample and so
miss how settings scatter around the line; on simulated studies such intervals are far too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "RunPoint", "ScalingLaw", "fit_scaling_law", "percentile_interval"]

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_NUM_RESAMPLES = 2000
_MIN_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """The result of one run.

    Attributes:
        setting: A text that is the same for runs that differ only in their seed.
        compute: The floating-point operations of the whole training.
        value: The loss or error, above zero.
    """

    setting: str
    compute: float
    value: float


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """A power law E = beta C^alpha, and the laws fitted to resampled runs.

    Attributes:
        alpha: The fitted exponent.
        log_beta: The natural logarithm of the fitted factor.
        frontier: Compute and value [2, P] of the fitted points, by increasing compute.
        resampled: alpha and log_beta [R, 2] of the fits to resampled runs.
    """

    alpha: float
    log_beta: float
    frontier: Floats
    resampled: Floats

    @property
    def alpha_interval(self) -> Interval:
        """The bootstrap interval of the exponent."""
        return percentile_interval(self.resampled[:, 0])

    def at(self, compute: Floats) -> Floats:
        """Return the values of the law at ``compute`` [P]."""
        return np.exp(self.log_beta + self.alpha * np.log(compute))

    def band(self, compute: Floats) -> tuple[Floats, Floats]:
        """Return the ends [P] of the law's bootstrap interval at ``compute`` [P]."""
        logs = self.resampled[:, 1:] + self.resampled[:, :1] * np.log(compute)  # [R, P]
        low, high = np.exp(np.percentile(logs, (2.5, 97.5), axis=0))
        return low, high


def fit_scaling_law(points: Sequence[RunPoint], seed: int = 0) -> ScalingLaw:
    """Fit a power law to the compute-optimal frontier, by least squares in the logarithms.

    Runs that differ only in their seed are one point, with their mean value. A point is on the
    frontier when no point with as much compute or less has a value as low. Every resample repeats
    the whole procedure, frontier included; one whose frontier is a single point is left out.

    Raises:
        ValueError: when the frontier has fewer than three points, or a value is not positive and
            finite.
    """
    for point in points:
        if not 0 < point.value < np.inf:
            raise ValueError(f"value ({point.value}) must be positive: a law is fitted to its log")
    compute, values = _by_setting(points)
    means = np.array([[seeds.mean() for seeds in values]])  # [1, S]
    on_frontier = _on_lower_envelope(compute, means)
    frontier = np.stack([compute, means[0]])[:, on_frontier[0]]
    if frontier.shape[1] < _MIN_POINTS:
        raise ValueError(
            f"points on the frontier ({frontier.shape[1]} of {len(compute)}) must be at least "
            f"{_MIN_POINTS} for a fit"
        )
    drawn = _resample(values, seed)  # [R, S]
    on_drawn = _on_lower_envelope(compute, drawn)
    ((alpha, log_beta),) = _lines(compute, means, on_frontier)
    lines = _lines(compute, drawn, on_drawn)
    return ScalingLaw(
        alpha=alpha,
        log_beta=log_beta,
        frontier=frontier,
        resampled=lines[np.isfinite(lines).all(axis=1)],
    )


def percentile_interval(values: Floats) -> Interval:
    """Return the 2.5 % and 97.5 % percentiles of values."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _by_setting(points: Sequence[RunPoint]) -> tuple[Floats, list[Floats]]:
    """Return the compute [S] of every setting, increasing, and the values of its seeds."""
    values: dict[tuple[float, str], list[float]] = {}
    for point in points:
        values.setdefault((point.compute, point.setting), []).append(point.value)
    order = sorted(values)
    return np.array([compute for compute, _ in order]), [np.array(values[key]) for key in order]


def _resample(values: Sequence[Floats], seed: int) -> Floats:
    """Return the means of drawn seeds [R, S], infinite where the setting was not drawn.

    Settings are drawn with replacement, as many as there are, and so are the seeds within each. A
    setting that is drawn twice counts once.
    """
    generator = np.random.default_rng(seed)
    num_settings = len(values)
    means = np.stack(
        [
            each[generator.integers(len(each), size=(_NUM_RESAMPLES, len(each)))].mean(axis=1)
            for each in values
        ],
        axis=1,
    )
    settings = generator.integers(num_settings, size=(_NUM_RESAMPLES, num_settings))
    is_drawn = (settings[:, :, None] == np.arange(num_settings)).any(axis=1)
    return np.where(is_drawn, means, np.inf)


def _on_lower_envelope(compute: Floats, values: Floats) -> NDArray[np.bool_]:
    """Return which of ``values`` [R, S] are on the lower envelope of their row over compute [S]:
    below all values with less compute, and not above any with the same compute."""
    lowest = np.minimum.accumulate(values, axis=1)
    up_to = lowest[:, np.searchsorted(compute, compute, side="right") - 1]
    start = np.full((len(values), 1), np.inf)
    before = np.concatenate([start, lowest], axis=1)[:, np.searchsorted(compute, compute)]
    return (values < before) & (values == up_to)


def _lines(compute: Floats, values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Fit a line in the logarithms to the ``chosen`` points [R, S] of every row.

    Returns slope and intercept [R, 2]; NaN for rows of a single point.
    """
    x, y = np.log(compute), np.log(np.where(chosen, values, 1.0))
    count = chosen.sum(axis=1)
    middle, level = chosen @ x / count, y.sum(axis=1) / count
    centred = np.where(chosen, x - middle[:, None], 0.0)
    with np.errstate(invalid="ignore"):
        slope = (centred * y).sum(axis=1) / (centred**2).sum(axis=1)
    return np.stack([slope, level - slope * middle], axis=1)

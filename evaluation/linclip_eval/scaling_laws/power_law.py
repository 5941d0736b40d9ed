"""Power laws over compute: the frontier of a set of runs, a fit, and what resampling makes of it.

A law is E = beta C^alpha (arXiv 2212.07143), a straight line in the logarithms, by least squares
over the compute-optimal frontier.

Intervals are 95 % percentile intervals of a bootstrap in two stages: settings are drawn, then seeds
within each. Single runs drawn from all would leave nearly every setting in every resample and so
miss how settings scatter around the line; on simulated studies such intervals are far too narrow.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

__all__ = [
    "Interval",
    "Point",
    "SaturatingLaw",
    "ScalingLaw",
    "fit_scaling_law",
    "percentile_interval",
]

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_NUM_RESAMPLES = 2000
#: Of the law with a floor, whose fit is iterative.
_NUM_SATURATING_RESAMPLES = 200
_LEAST_POINTS = 3
#: Share of the lowest value below which a floor is none: the fit never quite reaches zero.
_LEAST_FLOOR = 0.01


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one run reached.

    Attributes:
        setting: What runs that differ in their seed alone have in common.
        compute: Operations of the whole training.
        value: Loss or error, above zero.
    """

    setting: str
    compute: float
    value: float


@dataclass(frozen=True, kw_only=True)
class SaturatingLaw:
    """E = a C^-exponent + floor.

    Attributes:
        floor_interval: Of resampled runs.
        is_identifiable: Whether the points ask for a floor: the interval stays clear of zero.
    """

    exponent: float
    floor: float
    floor_interval: Interval
    is_identifiable: bool


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """E = beta C^alpha, and the laws of resampled runs.

    Attributes:
        alpha, log_beta: Of the fit; log_beta is a natural logarithm.
        frontier: Compute and value [2, P] of the points that were fitted, by rising compute.
        resampled: alpha and log_beta [R, 2] of the fits to resampled runs.
        saturating: The law with a floor; None where the frontier, or that of most resamples, has no
            more points than such a law has parameters, or no fit is found.
    """

    alpha: float
    log_beta: float
    frontier: Floats
    resampled: Floats
    saturating: SaturatingLaw | None

    @property
    def alpha_interval(self) -> Interval:
        return percentile_interval(self.resampled[:, 0])

    def at(self, compute: Floats) -> Floats:
        """The law at ``compute`` [P]."""
        return np.exp(self.log_beta + self.alpha * np.log(compute))

    def band(self, compute: Floats) -> tuple[Floats, Floats]:
        """Ends of the interval of the law at every ``compute`` [P]."""
        logs = self.resampled[:, 1:] + self.resampled[:, :1] * np.log(compute)  # [R, P]
        low, high = np.exp(np.percentile(logs, (2.5, 97.5), axis=0))
        return low, high


def fit_scaling_law(points: Sequence[Point], seed: int = 0) -> ScalingLaw:
    """Fit the compute-optimal frontier by least squares in the logarithms.

    Runs that differ in their seed alone are one point, with their mean value. A point is on the
    frontier when none that took as much compute or less has a value as low. Every resample goes the
    whole way again, frontier included; one whose frontier is a single point gives no line and is
    left out.

    Args:
        points: One per run.
        seed: Of the resampling.

    Raises:
        ValueError: when the frontier has fewer than three points, or a value has no logarithm.
    """
    for point in points:
        if not 0 < point.value < np.inf:
            raise ValueError(f"value ({point.value}) must be positive: a law is fitted to its log")
    compute, values = _by_setting(points)
    means = np.array([[of_setting.mean() for of_setting in values]])  # [1, S]
    on_it = _on_lower_envelope(compute, means)
    frontier = np.stack([compute, means[0]])[:, on_it[0]]
    if frontier.shape[1] < _LEAST_POINTS:
        raise ValueError(
            f"points on the frontier ({frontier.shape[1]} of {len(compute)}) must be at least "
            f"{_LEAST_POINTS} for a fit"
        )
    drawn = _resample(values, seed)  # [R, S]
    on_drawn = _on_lower_envelope(compute, drawn)
    ((alpha, log_beta),) = _lines(compute, means, on_it)
    lines = _lines(compute, drawn, on_drawn)
    few = list(zip(drawn, on_drawn, strict=True))[:_NUM_SATURATING_RESAMPLES]
    return ScalingLaw(
        alpha=alpha,
        log_beta=log_beta,
        frontier=frontier,
        resampled=lines[np.isfinite(lines).all(axis=1)],
        saturating=_fit_saturating(
            frontier, [np.stack([compute, row])[:, chosen] for row, chosen in few]
        ),
    )


def percentile_interval(values: Floats) -> Interval:
    """Where the middle 95 % of ``values`` lie."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _by_setting(points: Sequence[Point]) -> tuple[Floats, list[Floats]]:
    """Compute [S] of every setting, rising, and the values of its seeds."""
    values: dict[tuple[float, str], list[float]] = {}
    for point in points:
        values.setdefault((point.compute, point.setting), []).append(point.value)
    order = sorted(values)
    return np.array([compute for compute, _ in order]), [np.array(values[key]) for key in order]


def _resample(values: Sequence[Floats], seed: int) -> Floats:
    """Means of drawn seeds [R, S], infinite where the setting itself was not drawn.

    As many settings are drawn as there are, with replacement, and as many seeds within each. A
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
    """Which of ``values`` [R, S] are below all of their row with less compute [S], and not above
    any with as much."""
    lowest = np.minimum.accumulate(values, axis=1)
    up_to = lowest[:, np.searchsorted(compute, compute, side="right") - 1]
    start = np.full((len(values), 1), np.inf)
    before = np.concatenate([start, lowest], axis=1)[:, np.searchsorted(compute, compute)]
    return (values < before) & (values == up_to)


def _lines(compute: Floats, values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Slope and intercept [R, 2] in the logarithms, over what is ``chosen`` [R, S] of every row;
    NaN for rows of a single point."""
    x, y = np.log(compute), np.log(np.where(chosen, values, 1.0))
    count = chosen.sum(axis=1)
    middle, level = chosen @ x / count, y.sum(axis=1) / count
    centred = np.where(chosen, x - middle[:, None], 0.0)
    with np.errstate(invalid="ignore"):
        slope = (centred * y).sum(axis=1) / (centred**2).sum(axis=1)
    return np.stack([slope, level - slope * middle], axis=1)


def _fit_saturating(frontier: Floats, resampled: Sequence[Floats]) -> SaturatingLaw | None:
    law = _saturating(frontier)
    floors = [found[1] for found in map(_saturating, resampled) if found is not None]
    if law is None or 2 * len(floors) < len(resampled):
        return None
    exponent, floor = law
    interval = percentile_interval(np.array(floors))
    return SaturatingLaw(
        exponent=exponent,
        floor=floor,
        floor_interval=interval,
        is_identifiable=bool(interval[0] > _LEAST_FLOOR * frontier[1].min()),
    )


def _saturating(frontier: Floats) -> tuple[float, float] | None:
    """Exponent and floor; None for too few points, or where no fit is found."""
    if frontier.shape[1] <= 3:
        return None
    x, y = np.log(frontier)
    x = x - x.mean()  # so that the parameters are not tied to each other
    slope, level = np.polyfit(x, y, 1)

    def logarithm(x: Floats, log_a: float, exponent: float, log_floor: float) -> Floats:
        return np.logaddexp(log_a - exponent * x, log_floor)

    start = (level, -slope, y.min() - np.log(2))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # no covariance; none is used
            (_, exponent, log_floor), _ = curve_fit(logarithm, x, y, p0=start)
    except RuntimeError:  # no convergence
        return None
    return float(exponent), float(np.exp(log_floor))

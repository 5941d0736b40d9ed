"""Estimates of a decomposition from samples: bins, permutation null, bootstrap intervals.

Information estimated from samples is too large on average, and more so with more cells. Hence a
least number of samples per cell, the values that shuffled outcomes give, and intervals that take
the bias into account.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from ds_linclip.process.progress import progress
from linclip_eval.audit.pid import decompose

__all__ = ["PARTS", "Binned", "Estimate", "check_samples", "cluster", "estimate"]

#: The four parts of a decomposition, and their sum.
PARTS = ("unique_1", "unique_2", "redundant", "synergistic", "total")
SAMPLES_PER_CELL = 50
MAX_BINS = 20
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Binned:
    """Samples of a decision and of two sources in bins.

    Attributes:
        outcomes: [N] the decisions, numbered from 0.
        first, second: [N] the bins of both sources, numbered from 0.
        units: [N] the number of the image that a sample belongs to; images are independent of each
            other, samples of the same image are not.
    """

    outcomes: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    units: NDArray[np.int64]

    def table(
        self, outcomes: NDArray[np.int64] | None = None, weights: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """Return the counts [bins of first, bins of second, outcomes] of weighted samples."""
        shape = tuple(int(values.max()) + 1 for values in (self.first, self.second, self.outcomes))
        decisions = self.outcomes if outcomes is None else outcomes
        cells = np.ravel_multi_index((self.first, self.second, decisions), shape)
        counts = np.bincount(cells, weights, minlength=int(np.prod(shape)))
        return counts.astype(np.float64).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One part of the decomposition, in bits.

    Attributes:
        part: One of ``PARTS``.
        bits: The estimate, from all samples.
        low, high: Its 95 % interval, by a bootstrap over images.
        null_mean, null_high: Mean and 95 % quantile of what shuffled outcomes give.
        p_value: The share of shuffles, the actual order among them, that give as much or more.
    """

    part: str
    bits: float
    low: float
    high: float
    null_mean: float
    null_high: float
    p_value: float


def check_samples(num_samples: int, num_bins: int, num_outcomes: int) -> None:
    """Check that there are enough samples for the cells of the table.

    Raises:
        ValueError: for a number of bins that is not in [2, 20], or fewer than 50 samples per cell,
            naming what works.
    """
    if not 2 <= num_bins <= MAX_BINS:
        raise ValueError(f"--bins ({num_bins}) must be in [2, {MAX_BINS}]: take 2 or more")
    needed = SAMPLES_PER_CELL * num_bins**2 * num_outcomes
    if needed <= num_samples:
        return
    fitting = int((num_samples / (SAMPLES_PER_CELL * num_outcomes)) ** 0.5)
    advice = f"take --bins {fitting}"
    if fitting < 2:
        least = SAMPLES_PER_CELL * 4
        groups = num_samples // least
        advice = f"take {least * num_outcomes} samples or more, and 2 bins"
        if 2 <= groups < num_outcomes:
            advice = f"take --bins 2 --groups {groups}, or more samples"
    raise ValueError(
        f"--bins ({num_bins}) must leave {SAMPLES_PER_CELL} samples for each of {num_bins} x "
        f"{num_bins} x {num_outcomes} cells, {needed} of them, and there are {num_samples}: "
        f"{advice}"
    )


def cluster(
    features: NDArray[np.float32], num_bins: int, *, what: str, seed: int
) -> NDArray[np.int64]:
    """Return the k-means cluster of every feature; decisions play no part in it.

    Args:
        features: [N, E].
        num_bins: The number of clusters.
        what: The name of the features in messages.
        seed: The seed of the first centres.

    Raises:
        ValueError: for fewer different features than clusters.
    """
    num_different = len(np.unique(features, axis=0))
    if num_different < num_bins:
        advice = f"take {num_different}" if num_different > 1 else "take other data"
        raise ValueError(
            f"--bins ({num_bins}) must be at most the number of different {what} "
            f"({num_different}): {advice}"
        )
    found = KMeans(num_bins, n_init=10, random_state=seed).fit_predict(features)
    bins: NDArray[np.int64] = found.astype(np.int64)
    return bins


def estimate(samples: Binned, *, num_repeats: int, seed: int) -> tuple[list[Estimate], float]:
    """Estimate the decomposition of the decision's information.

    The null is that decisions have nothing to do with the sources: decisions are shuffled over the
    samples. The interval is the basic bootstrap's (Davison and Hinkley 1997, section 5.2), from
    images drawn with replacement: it is reflected at the estimate, which takes out the bias that
    drawing repeats, and cut at 0.

    Args:
        samples: The samples; their bins are not computed again for the bootstrap.
        num_repeats: The number of shuffles, and that of bootstrap samples.
        seed: The seed of both.

    Returns:
        An estimate for each of ``PARTS``, and the largest error of the optimisation, in bits.

    Raises:
        ValueError: when all outcomes are the same.
    """
    if (samples.outcomes == samples.outcomes[0]).all():
        raise ValueError(
            f"the decisions ({len(samples.outcomes)}) must be of two kinds or more: the model "
            "decides the same for all samples"
        )
    for_null, for_units = np.random.default_rng(seed).spawn(2)
    num_units = int(samples.units.max()) + 1

    def shuffled() -> NDArray[np.float64]:
        return samples.table(outcomes=for_null.permutation(samples.outcomes))

    def resampled() -> NDArray[np.float64]:
        drawn = np.bincount(for_units.integers(num_units, size=num_units), minlength=num_units)
        return samples.table(weights=drawn[samples.units])

    found = decompose(samples.table())
    actual = np.array([getattr(found, part) for part in PARTS])
    with progress(desc="audit", total=2 * num_repeats, unit="table", delay=5, leave=False) as bar:

        def repeat(draw: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
            """Return the parts [num_repeats, 5] of as many tables."""
            rows = []
            for _ in range(num_repeats):
                each = decompose(draw())
                rows.append([getattr(each, part) for part in PARTS])
                bar.update()
            return np.array(rows)

        null, resamples = repeat(shuffled), repeat(resampled)
    tail = (1 - _CONFIDENCE) / 2
    reflected = 2 * actual - np.quantile(resamples, (1 - tail, tail), axis=0)
    low, high = np.clip(reflected, 0, None)
    # A difference within the error of the optimisation is none.
    as_much = 1 + (null >= actual - found.gap).sum(axis=0)
    estimates = [
        Estimate(
            part=part,
            bits=float(actual[i]),
            low=float(low[i]),
            high=float(high[i]),
            null_mean=float(null[:, i].mean()),
            null_high=float(np.quantile(null[:, i], _CONFIDENCE)),
            p_value=float(as_much[i] / (1 + num_repeats)),
        )
        for i, part in enumerate(PARTS)
    ]
    return estimates, found.gap

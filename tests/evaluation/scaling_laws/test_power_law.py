"""Fits to points that follow known laws."""

from dataclasses import replace

import numpy as np
import pytest

from linclip_eval.scaling_laws.power_law import RunPoint, fit_scaling_law

COMPUTE = np.geomspace(1e15, 1e18, 8)


def points(alpha: float, *, noise: float = 0.0, seeds: int = 1) -> list[RunPoint]:
    generator = np.random.default_rng(7)
    return [
        RunPoint(
            setting=f"{compute:g}",
            compute=compute,
            value=100 * compute**alpha * np.exp(noise * generator.normal()),
        )
        for compute in COMPUTE
        for _ in range(seeds)
    ]


def test_exact_law_is_recovered():
    law = fit_scaling_law(points(-0.11))
    assert law.alpha == pytest.approx(-0.11)
    assert law.log_beta == pytest.approx(np.log(100))
    assert law.alpha_interval == pytest.approx((-0.11, -0.11))
    middle = np.array([3e16])
    assert law.at(middle) == pytest.approx(100 * middle**-0.11)
    low, high = law.band(middle)
    assert low == pytest.approx(law.at(middle))
    assert high == pytest.approx(law.at(middle))


def test_interval_is_as_wide_as_the_error_of_the_slope():
    law = fit_scaling_law(points(-0.2, noise=0.1, seeds=3))
    low, high = law.alpha_interval
    assert low < law.alpha < high
    # The deviation of a slope is that of the points over the root of their squared distances.
    deviation = 0.1 / np.sqrt(3) / (np.log(COMPUTE).std() * np.sqrt(len(COMPUTE)))
    assert deviation < (high - low) / 2 < 6 * deviation
    low, high = law.band(COMPUTE)
    assert np.all(low < law.at(COMPUTE))
    assert np.all(law.at(COMPUTE) < high)


@pytest.mark.slow
def test_intervals_contain_the_truth_when_settings_scatter_around_the_line():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        law = fit_scaling_law(
            [
                RunPoint(
                    setting=f"{compute:g}",
                    compute=compute,
                    value=compute**-0.2 * np.exp(detour + 0.05 * generator.normal()),
                )
                for compute in COMPUTE
                for detour in (0.2 * generator.random(),)
                for _ in range(3)
            ]
        )
        low, high = law.alpha_interval
        held += low <= -0.2 <= high
    assert held >= 51  # of 57 expected; intervals from single runs hold it in about 40


def test_frontier_is_the_lower_envelope():
    def point(compute: float, value: float) -> RunPoint:
        return RunPoint(setting=f"{compute} {value}", compute=compute, value=value)

    law = fit_scaling_law(
        [
            *(point(8, 1.0), point(2, 3.0), point(1, 4.0)),
            point(1, 5.0),  # beaten at equal compute
            point(4, 3.5),  # beaten by less compute
            point(5, 3.0),  # no better than less compute
        ]
    )
    assert law.frontier.tolist() == [[1, 2, 8], [4.0, 3.0, 1.0]]


def test_seeds_are_one_point_with_their_mean():
    law = fit_scaling_law(
        [
            *points(-0.1),
            # Alone it would be the best of all; with its other seed it is beaten.
            RunPoint(setting="lucky", compute=2e15, value=1e-3),
            RunPoint(setting="lucky", compute=2e15, value=10.0),
        ]
    )
    assert law.frontier.shape == (2, 8)
    assert law.alpha == pytest.approx(-0.1)


def test_resampling_is_the_same_every_time():
    noisy = points(-0.2, noise=0.1, seeds=2)
    first, again = fit_scaling_law(noisy), fit_scaling_law(noisy)
    assert np.array_equal(first.resampled, again.resampled)
    other = fit_scaling_law(noisy, seed=1)
    assert other.alpha == first.alpha
    assert not np.array_equal(first.resampled, other.resampled)


def test_resamples_with_a_single_point_are_left_out():
    law = fit_scaling_law(points(-0.2)[:3])
    # All three draws are the same setting in 3 of 27 cases.
    assert len(law.resampled) / 2000 == pytest.approx(24 / 27, abs=0.03)
    assert np.isfinite(law.resampled).all()


def test_single_seeds_get_an_interval_from_their_settings():
    low, high = fit_scaling_law(points(-0.2, noise=0.05)).alpha_interval
    assert high - low > 0.005


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"frontier \(2 of 2\) must be at least 3 for a fit"):
        fit_scaling_law([*points(-0.2)[:2], points(-0.2)[1]])
    with pytest.raises(ValueError, match=r"frontier \(1 of 8\) must be at least 3"):
        fit_scaling_law(points(0.2))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_value_without_a_logarithm_is_refused(value):
    bad = replace(points(-0.2)[0], value=value)
    with pytest.raises(ValueError, match=rf"value \({value}\) must be positive"):
        fit_scaling_law([*points(-0.2), bad])

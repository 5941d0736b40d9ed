"""Estimates from samples of decision functions whose decomposition is known."""

from collections.abc import Callable

import numpy as np
import pytest

from linclip_eval.audit.estimate import Binned, Estimate, check_samples, cluster, estimate

NUM = 2000


def samples_of(
    decide: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray],
    *,
    same_source: bool = False,
) -> Binned:
    """Return decisions about two sources with four bins each, independent unless the same."""
    rng = np.random.default_rng(3)
    first, second = rng.integers(4, size=(2, NUM))
    if same_source:
        second = first
    outcomes = np.asarray(decide(first, second, rng), np.int64)
    return Binned(outcomes=outcomes, first=first, second=second, units=np.arange(NUM))


def estimated(samples: Binned, **options: int) -> dict[str, Estimate]:
    arguments = {"num_repeats": 40, "seed": 0} | options
    return {each.part: each for each in estimate(samples, **arguments)[0]}


@pytest.mark.parametrize(
    ("part", "bits", "samples"),
    [
        ("unique_1", 1, samples_of(lambda first, second, rng: first // 2)),
        ("unique_2", 1, samples_of(lambda first, second, rng: second % 2)),
        ("redundant", 1, samples_of(lambda first, second, rng: first % 2, same_source=True)),
        ("synergistic", 1, samples_of(lambda first, second, rng: (first + second) % 2)),
        # One in four pairs is right: H(1/4) bits, and neither source alone tells anything.
        ("synergistic", 0.811, samples_of(lambda first, second, rng: first == second)),
    ],
    ids=["first only", "second only", "copy", "parity", "match"],
)
def test_a_decision_function_is_found_out(part, bits, samples):
    found = estimated(samples)
    for name, each in found.items():
        expected = bits if name in (part, "total") else 0
        assert each.bits == pytest.approx(expected, abs=0.03), name
        assert each.low <= expected + 0.01, name
        assert each.high >= expected - 0.03, name
    assert found[part].p_value == pytest.approx(1 / 41)
    assert found[part].null_high < 0.03


def test_a_decision_by_chance_has_no_information_beyond_that_of_shuffled_ones():
    found = estimated(samples_of(lambda first, second, rng: rng.integers(2, size=NUM)))
    for each in found.values():
        assert each.p_value > 0.1
        assert each.low == pytest.approx(0, abs=0.005)
        assert each.bits < 0.02
    # Of 16 x 2 cells, 15 are free: 15 / (2 N ln 2) bits, the first order of the bias.
    assert found["total"].null_mean == pytest.approx(15 / (2 * NUM * np.log(2)), rel=0.2)


def noisy(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (first + second) % 2 ^ (rng.random(NUM) < 0.2)


def test_intervals_are_those_of_the_images_not_of_the_samples():
    """Every sample four times over tells nothing more, and narrows no interval."""
    once = samples_of(noisy)
    several = Binned(
        **{name: np.tile(getattr(once, name), 4) for name in ("outcomes", "first", "second")},
        units=np.tile(np.arange(NUM), 4),
    )
    one, four = (estimated(samples)["synergistic"] for samples in (once, several))
    assert four.bits == pytest.approx(one.bits, abs=2e-6)
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=1e-4)
    # H(0.2) = 0.722 is the noise.
    assert one.low < 1 - 0.722 < one.high


def test_intervals_of_parts_that_are_zero_contain_it():
    """Estimates from samples, and more so from resamples, are above 0; the interval is not."""
    samples = samples_of(lambda first, second, rng: first % 2 ^ (rng.random(NUM) < 0.3))
    found = estimated(samples)["synergistic"]
    assert found.bits > 0.001
    assert found.low == 0


def test_a_seed_gives_the_same_numbers():
    samples = samples_of(noisy)
    assert estimated(samples, seed=1) == estimated(samples, seed=1)
    assert estimated(samples, seed=1) != estimated(samples, seed=2)


def test_one_decision_only_is_refused():
    with pytest.raises(ValueError, match=r"the decisions \(2000\) must be of two kinds or more"):
        estimated(samples_of(lambda first, second, rng: np.zeros(NUM)))


def test_samples_per_cell_are_checked_with_advice_that_works():
    check_samples(1800, 3, 4)
    for arguments, advice in {
        (1799, 3, 4): "take --bins 2$",
        (720, 5, 2): "take --bins 2$",
        (5000, 20, 2): "take --bins 7$",
        (1000, 2, 10): "take --bins 2 --groups 5, or more samples$",
        (399, 2, 2): "take 400 samples or more, and 2 bins$",
    }.items():
        with pytest.raises(
            ValueError, match=rf"^--bins \({arguments[1]}\) must leave 50.*{advice}"
        ):
            check_samples(*arguments)
    for num_bins in (1, 21):
        with pytest.raises(ValueError, match=rf"--bins \({num_bins}\) must be in \[2, 20\]"):
            check_samples(10**9, num_bins, 2)


def test_clusters_are_found_and_must_not_be_more_than_different_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    features = (np.eye(3)[labels] + 0.05 * rng.normal(size=(60, 3))).astype(np.float32)
    bins = cluster(features, 3, what="images", seed=0)
    assert len(set(zip(bins.tolist(), labels.tolist(), strict=True))) == 3
    with pytest.raises(
        ValueError, match=r"--bins \(4\) must be .* different captions \(3\): take 3"
    ):
        cluster(np.eye(3, dtype=np.float32)[labels], 4, what="captions", seed=0)

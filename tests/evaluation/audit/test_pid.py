"""Decompositions with known values, by brute force, and of arbitrary tables."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import minimize

from linclip_eval.audit.pid import Decomposition, decompose, mutual_information

PARTS = ("unique_1", "unique_2", "redundant", "synergistic")


def gate(output: Callable[[int, int], int], num_y: int = 2) -> np.ndarray:
    """Return the table of a function of two independent fair bits."""
    table = np.zeros((2, 2, num_y))
    for a in range(2):
        for b in range(2):
            table[a, b, output(a, b)] = 0.25
    return table


def parts_of(found: Decomposition) -> list[float]:
    return [getattr(found, part) for part in PARTS]


def equal_bits(num: int) -> np.ndarray:
    table = np.zeros((num, num, num))
    table[range(num), range(num), range(num)] = 1
    return table


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # 3/4 log2(4/3) = 0.311278: I(Y; X1) of AND, all of it redundant.
        (gate(lambda a, b: a & b), [0, 0, 0.75 * np.log2(4 / 3), 0.5]),
        (gate(lambda a, b: a | b), [0, 0, 0.75 * np.log2(4 / 3), 0.5]),
        (gate(lambda a, b: a ^ b), [0, 0, 0, 1]),
        (gate(lambda a, b: a), [1, 0, 0, 0]),
        (gate(lambda a, b: b), [0, 1, 0, 0]),
        (gate(lambda a, b: 2 * a + b, num_y=4), [1, 1, 0, 0]),
        (gate(lambda a, b: a + b, num_y=3), [0, 0, 0.5, 1]),
        (equal_bits(2), [0, 0, 1, 0]),
        (equal_bits(8), [0, 0, 3, 0]),
        (gate(lambda a, b: 1), [0, 0, 0, 0]),
    ],
    ids=[
        "and",
        "or",
        "xor",
        "copy 1",
        "copy 2",
        "copy both",
        "sum",
        "equal",
        "equal 8",
        "constant",
    ],
)
def test_known_decompositions(table, expected):
    found = decompose(table)
    assert parts_of(found) == pytest.approx(expected, abs=1e-6)
    assert found.gap <= 1e-6


def test_tolerance_is_kept():
    found = decompose(gate(lambda a, b: a & b), tolerance=1e-9)
    assert parts_of(found) == pytest.approx([0, 0, 0.75 * np.log2(4 / 3), 0.5], abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_two_by_two_tables_agree_with_a_search_over_all_distributions(seed):
    """With given margins, a table of 2 x 2 x 2 has one degree of freedom for each y."""
    table = np.random.default_rng(seed).gamma(0.5, size=(2, 2, 2))
    table /= table.sum()
    change = np.array([[1, -1], [-1, 1]])[..., None]
    low = -np.minimum(table[0, 0], table[1, 1])
    high = np.minimum(table[0, 1], table[1, 0])

    def information(moved: np.ndarray) -> float:
        return mutual_information(np.clip(table + change * moved, 0, None).reshape(4, 2))

    starts = [low + (high - low) * np.array([i, j]) for i in (0.1, 0.9) for j in (0.1, 0.9)]
    bounds = list(zip(low, high, strict=True))
    least = min(
        minimize(information, start, method="Nelder-Mead", bounds=bounds, tol=1e-12).fun
        for start in starts
    )
    found = decompose(table)
    assert found.synergistic == pytest.approx(information(np.zeros(2)) - least, abs=1e-6)
    first, second = table.sum(axis=1), table.sum(axis=0)
    assert found.unique_1 == pytest.approx(least - mutual_information(second), abs=1e-6)
    assert found.unique_2 == pytest.approx(least - mutual_information(first), abs=1e-6)


def check_identities(table: np.ndarray, found: Decomposition) -> None:
    probabilities = table / table.sum()
    both = mutual_information(probabilities.reshape(-1, table.shape[2]))
    assert min(parts_of(found)) >= -1e-12
    assert found.gap <= 1e-6
    first, second = probabilities.sum(axis=1), probabilities.sum(axis=0)
    assert found.unique_1 + found.redundant == pytest.approx(mutual_information(first), abs=1e-9)
    assert found.unique_2 + found.redundant == pytest.approx(mutual_information(second), abs=1e-9)
    assert found.total == pytest.approx(both, abs=1e-9)


SHAPES = arrays.array_shapes(min_dims=3, max_dims=3, max_side=4)
TABLES = arrays.arrays(np.int64, SHAPES, elements=st.integers(0, 9)).filter(np.any)


@given(TABLES)
def test_parts_are_not_negative_and_add_up(table):
    check_identities(table, decompose(table))


@given(TABLES, st.randoms(use_true_random=False))
def test_names_and_order_of_the_values_do_not_matter(table, random):
    found = parts_of(decompose(table))
    moved = table
    for axis, size in enumerate(table.shape):
        moved = np.take(moved, random.sample(range(size), size), axis=axis)
    assert parts_of(decompose(3 * moved)) == pytest.approx(found, abs=2e-6)
    exchanged = parts_of(decompose(table.transpose(1, 0, 2)))
    assert [exchanged[i] for i in (1, 0, 2, 3)] == pytest.approx(found, abs=2e-6)


@given(TABLES)
def test_what_the_second_source_can_be_made_of_is_not_unique_to_it(table):
    """Where X2 is a function of X1, all that it has is redundant."""
    copied = np.zeros((*table.shape[:2], table.shape[1], table.shape[2]))
    copied[:, range(table.shape[1]), range(table.shape[1])] = table
    found = decompose(copied.reshape(-1, *copied.shape[2:]))  # X1 becomes (X1, X2)
    assert found.unique_2 == pytest.approx(0, abs=1e-6)
    assert found.synergistic == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("spread", [1.0, 12.0], ids=["even", "over many magnitudes"])
def test_largest_tables_are_decomposed(spread):
    table = np.exp(spread * np.random.default_rng(0).normal(size=(20, 20, 20)))
    check_identities(table, decompose(table))


@pytest.mark.parametrize(
    "table",
    [np.ones((2, 2)), np.zeros((2, 2, 2)), -np.ones((2, 2, 2)), np.full((2, 2, 2), np.nan)],
    ids=["two axes", "zero", "negative", "nan"],
)
def test_what_is_no_distribution_is_refused(table):
    with pytest.raises(ValueError, match=r"table \(2 x .*\) must have three axes and finite"):
        decompose(table)


def test_a_tolerance_below_the_precision_is_refused():
    with pytest.raises(ValueError, match=r"tolerance \(1e-12\) must be at least 1e-9 bits"):
        decompose(np.ones((2, 2, 2)), tolerance=1e-12)

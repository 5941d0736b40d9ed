"""Partial information decomposition of a discrete target and two sources, with a certificate.

The decomposition is that of Bertschinger et al. (2014, "Quantifying unique information"). Among all
distributions Q with P's margins (x1, y) and (x2, y), one is sought that minimises I_Q(Y; X1, X2):
what remains there can be had from the margins alone, and what P has beyond it is synergy.

With q = Q(x1, x2, y), the minimum of f(q) = sum q log(q / Q(x1, x2)) = -H_Q(Y | X1, X2) is a convex
problem whose dual is

    maximise  sum P(x1, y) u(x1, y) + sum P(x2, y) v(x2, y)
    so that   log sum_y exp(u(x1, y) + v(x2, y)) <= 0  for every (x1, x2).

Any u and v can be shifted to satisfy the constraints, which gives a lower bound; any q with the
right margins gives an upper one. Their difference, the gap, bounds the error of the result,
whatever the solver did.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

__all__ = ["Decomposition", "decompose", "mutual_information"]

Array = NDArray[np.float64]

_LN2 = math.log(2)
_MAX_STEPS = 200
#: Newton steps of one centring; where rounding keeps it from its end, the gap decides.
_MAX_CENTRING_STEPS = 12
#: The barrier is this much weaker after every centring.
_BARRIER_FACTOR = 0.1
#: A centring ends when the Newton decrement, squared, is this small relative to the barrier.
_CENTRED = 0.1
_MIN_STEP = 1e-10
_MAX_FITS, _MARGIN_ERROR = 100, 1e-14


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The information, in bits, that two sources X1 and X2 have about a target Y.

    Attributes:
        unique_1: What only X1 has.
        unique_2: What only X2 has.
        redundant: What either of them has.
        synergistic: What only both together have.
        gap: The largest possible error of each of the four that comes from the optimisation.
    """

    unique_1: float
    unique_2: float
    redundant: float
    synergistic: float
    gap: float

    @property
    def total(self) -> float:
        """The information I(Y; X1, X2) in bits, the sum of the four parts."""
        return self.unique_1 + self.unique_2 + self.redundant + self.synergistic


def decompose(table: Array, *, tolerance: float = 1e-6) -> Decomposition:
    """Decompose the information that X1 and X2 have about Y.

    Args:
        table: [num_x1, num_x2, num_y] joint probabilities or counts; they are divided by their sum.
        tolerance: The largest gap between upper and lower bound that is accepted, in bits.

    Returns:
        The four parts, none of them negative. They satisfy unique_1 + redundant = I(Y; X1),
        unique_2 + redundant = I(Y; X2), and together I(Y; X1, X2), up to rounding.

    Raises:
        ValueError: for a table without three axes, with a negative or infinite entry, or all zero,
            and for a tolerance below 1e-9.
        ArithmeticError: when the bounds do not come within ``tolerance``.

    Source: Bertschinger, Rauh, Olbrich, Jost and Ay (2014), Definition 4; as an estimator of the
    interactions of modalities, Liang et al. (arXiv 2302.12247), section 3.1.
    """
    table = np.asarray(table, np.float64)
    if table.ndim != 3 or not np.isfinite(table).all() or (table < 0).any() or not table.any():
        raise ValueError(
            f"table ({' x '.join(map(str, table.shape))}) must have three axes and finite entries "
            ">= 0 that are not all 0"
        )
    if not tolerance >= 1e-9:
        raise ValueError(f"tolerance ({tolerance:g}) must be at least 1e-9 bits")
    joint = _without_empty(table / table.sum())
    first, second = joint.sum(axis=1), joint.sum(axis=0)  # [num_x1, num_y], [num_x2, num_y]
    by_first, by_second = mutual_information(first), mutual_information(second)
    both = mutual_information(joint.reshape(-1, joint.shape[2]))
    entropy = -_sum_x_log(joint.sum(axis=(0, 1)), np.ones(joint.shape[2])) / _LN2
    least, gap = _least_information(first, second, entropy, tolerance)
    if gap > tolerance:
        raise ArithmeticError(
            f"the bounds of the decomposition of {' x '.join(map(str, table.shape))} cells must "
            f"come within {tolerance:g} bits of each other: {gap:.2g} remain"
        )
    # Bounds that hold for the exact minimum, so that no part is negative by the error of the gap.
    least = max(min(least, both, by_first + by_second), by_first, by_second)
    return Decomposition(
        unique_1=least - by_second,
        unique_2=least - by_first,
        redundant=by_first + by_second - least,
        synergistic=max(both - least, 0.0),
        gap=gap,
    )


def mutual_information(joint: Array) -> float:
    """Return the mutual information of a joint distribution [num_x, num_y], in bits."""
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return max(0.0, _sum_x_log(joint, independent) / _LN2)


def _without_empty(joint: Array) -> Array:
    """Return a table without the values of X1, X2 and Y that never occur."""
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        joint = np.compress(joint.sum(axis=others) > 0, joint, axis=axis)
    return joint


def _sum_x_log(x: Array, y: Array) -> float:
    """Return the sum of x log(x / y) in nats; 0 log 0 is 0."""
    some = x > 0
    return float(np.sum(x[some] * np.log(x[some] / y[some])))


def _negative_entropy(q: Array) -> float:
    """Return -H(Y | X1, X2) in nats, the function that is minimised."""
    return _sum_x_log(q, np.broadcast_to(q.sum(axis=2, keepdims=True), q.shape))


def _least_information(
    first: Array, second: Array, entropy: float, tolerance: float
) -> tuple[float, float]:
    """Return the minimum of I_Q(Y; X1, X2) in bits from above, and its distance to a lower bound.

    A barrier method: Newton steps minimise f(q) - mu sum log q under the margins, for smaller and
    smaller mu, from q of X1 and X2 independent given Y. At the minimum, its multipliers are
    feasible in the dual, and the gap is mu times the number of entries.
    """
    support = (first[:, None] > 0) & (second[None] > 0)  # [num_x1, num_x2, num_y]
    q = first[:, None] * second[None] / first.sum(axis=0)
    upper, lower = np.inf, -np.inf
    mu = 0.1 / support.sum()
    smallest = 0.05 * tolerance * _LN2 / support.sum()
    num_steps = 0
    for _ in range(_MAX_STEPS):
        step, u, v, decrement = _newton(q, support, first, second, mu)
        lower = max(lower, _dual_value(u, v, support, first, second))
        q = _line_search(q, step, support, mu, decrement)
        num_steps += 1
        if decrement > _CENTRED * mu and num_steps < _MAX_CENTRING_STEPS:
            continue
        num_steps = 0
        q = _with_margins(q, first, second)
        upper = min(upper, _negative_entropy(q))
        if (upper - lower) / _LN2 <= tolerance / 2 or mu < smallest:
            break
        mu *= _BARRIER_FACTOR
    return upper / _LN2 + entropy, max(0.0, (upper - lower) / _LN2)


def _newton(
    q: Array, support: NDArray[np.bool_], first: Array, second: Array, mu: float
) -> tuple[Array, Array, Array, float]:
    """Return the Newton step of q, the multipliers of both margins, and the decrement squared.

    The Hessian consists of blocks diag(1 / q + mu / q^2) - 1 1^T / Q(x1, x2), one for each
    (x1, x2); their inverses are diag(d) + d d^T / rest with d = q^2 / (q + mu).
    """
    safe = np.where(support, q, 1.0)
    d = np.where(support, q * q / (safe + mu), 0.0)
    # Q(x1, x2) minus the sum of d, without the cancellation.
    rest = np.where(support, q * mu / (safe + mu), 0.0).sum(axis=2)
    scaled = d / np.sqrt(np.where(rest > 0, rest, 1.0))[..., None]
    total = q.sum(axis=2, keepdims=True)
    log = np.log(safe / np.where(total > 0, total, 1.0))
    gradient = np.where(support, log - mu / safe, 0.0)

    def solve(x: Array) -> Array:
        """Return the inverse of the Hessian times x."""
        return d * x + scaled * (scaled * x).sum(axis=2, keepdims=True)

    wanted = np.concatenate([first.ravel(), second.ravel()])
    right = wanted - _margins(q - solve(gradient))
    multipliers = _solve_margins(_margin_system(d, scaled), right, second)
    u = multipliers[: first.size].reshape(first.shape)
    v = multipliers[first.size :].reshape(second.shape)
    residual = np.where(support, u[:, None] + v[None] - gradient, 0.0)
    step = solve(residual)
    return step, u, v, float((residual * step).sum())


def _margins(q: Array) -> Array:
    """Return the margins (x1, y), then (x2, y), as one vector."""
    return np.concatenate([q.sum(axis=1).ravel(), q.sum(axis=0).ravel()])


def _margin_system(d: Array, scaled: Array) -> Array:
    """Return A H^-1 A^T, for the matrix A that maps q to its margins and the Hessian H."""
    num_1, num_2, num_y = d.shape
    size_1, size = num_1 * num_y, (num_1 + num_2) * num_y
    system = np.diag(_margins(d))
    outer = scaled[:, :, :, None] * scaled[:, :, None, :]  # [num_x1, num_x2, num_y, num_y]
    for i, block in enumerate(outer.sum(axis=1)):
        rows = slice(i * num_y, (i + 1) * num_y)
        system[rows, rows] += block
    for k, block in enumerate(outer.sum(axis=0)):
        rows = slice(size_1 + k * num_y, size_1 + (k + 1) * num_y)
        system[rows, rows] += block
    every = np.arange(num_y)
    outer[:, :, every, every] += d
    system[:size_1, size_1:] = outer.transpose(0, 2, 1, 3).reshape(size_1, size - size_1)
    system[size_1:, :size_1] = system[:size_1, size_1:].T
    return system


def _solve_margins(system: Array, right: Array, second: Array) -> Array:
    """Solve for the multipliers of the margins.

    Left out are the margins of probability 0, and one (x2, y) for every y: the margins of X1 and of
    X2 both sum to P(y).
    """
    kept = np.diagonal(system) > 0
    kept_2 = kept[len(right) - second.size :].reshape(second.shape)  # a view
    kept_2[second.argmax(axis=0), np.arange(second.shape[1])] = False
    scale = 1 / np.sqrt(np.diagonal(system)[kept])
    matrix = system[np.ix_(kept, kept)] * scale[:, None] * scale
    solution = np.zeros(len(right))
    ridge = 0.0
    while True:
        try:
            factor = cho_factor(matrix + ridge * np.eye(len(matrix)))
            break
        except LinAlgError:  # rounding: the gap says whether the steps still lead anywhere
            ridge = max(10 * ridge, 1e-15)
    values = cho_solve(factor, scale * right[kept])
    values += cho_solve(factor, scale * right[kept] - matrix @ values)
    solution[kept] = scale * values
    return solution


def _line_search(
    q: Array, step: Array, support: NDArray[np.bool_], mu: float, decrement: float
) -> Array:
    """Return q after the longest step of a halving sequence that stays positive and descends."""
    shrinking = step < 0
    ratios = q[shrinking] / -step[shrinking]
    length = min(1.0, 0.99 * float(ratios.min())) if shrinking.any() else 1.0

    def value(x: Array) -> float:
        return _negative_entropy(x) - mu * float(np.log(x[support]).sum())

    before = value(q)
    while length > _MIN_STEP:
        moved = q + length * step
        if value(moved) <= before - 0.1 * length * decrement + 1e-13 * abs(before):
            return moved
        length /= 2
    return q


def _dual_value(
    u: Array, v: Array, support: NDArray[np.bool_], first: Array, second: Array
) -> float:
    """Return the lower bound of multipliers, after a shift that makes them feasible."""
    shifted = np.where(support, u[:, None] + v[None], -np.inf)
    some = support.any(axis=2)
    top = np.where(some, shifted.max(axis=2), 0.0)
    excess = np.where(some, top, -np.inf)
    excess[some] += np.log(np.exp(shifted - top[..., None]).sum(axis=2)[some])
    by_first = excess.max(axis=1)  # [num_x1]
    by_second = (excess - by_first[:, None]).max(axis=0)  # [num_x2], at most 0
    u, v = u - by_first[:, None], v - by_second[:, None]
    return float((first * u).sum() + (second * v).sum())


def _with_margins(q: Array, first: Array, second: Array) -> Array:
    """Return q with its margins made exact by proportional fitting."""
    for _ in range(_MAX_FITS):
        q = q * _ratio(first, q.sum(axis=1))[:, None]
        q = q * _ratio(second, q.sum(axis=0))[None]
        if np.abs(q.sum(axis=1) - first).max() < _MARGIN_ERROR:
            break
    return q


def _ratio(wanted: Array, found: Array) -> Array:
    return np.divide(wanted, found, out=np.zeros_like(wanted), where=found > 0)

"""The statements of docs/theory.md against definitions by hand, and the page against its tables."""

import csv
import math
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest
import torch

from experiments import theory
from experiments.in_context import (
    Regression,
    Risk,
    Step,
    best_example_weights,
    best_preconditioner,
    measure_risks,
    predict_by_attention,
    risk_of_step,
)
from experiments.token_limit import (
    PAIRS,
    Distance,
    Tokens,
    curve_of,
    measure_distances,
    predict_rms,
    slope,
    softmax_gap,
)
from helpers import REPOSITORY
from linclip_kernels.linear_attention.reference import relative_rms

EYE = torch.eye(5, dtype=torch.float64)
ISOTROPIC = Regression(EYE, EYE, 0.3, 20)
EQUAL = torch.ones(20, dtype=torch.float64)
PAGE = (REPOSITORY / "docs" / "theory.md").read_text()
RESULTS = REPOSITORY / "docs" / "results" / "theory"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def general(**options) -> Regression:
    roots = randn(2, 5, 5, seed=3)
    covariances = roots @ roots.mT / 5 + 0.1 * EYE
    return Regression(covariances[0], covariances[1], 0.3, 20, **options)


def read(kind, name: str) -> list:
    types = get_type_hints(kind)
    with (RESULTS / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        kind(
            **{
                field.name: None
                if row[field.name] == ""
                else _typed(types[field.name])(row[field.name])
                for field in fields(kind)
            }
        )
        for row in rows
    ]


def _typed(annotation):
    return annotation if annotation in (str, int) else float


def test_isotropic_step_has_the_known_value():
    matrix = best_preconditioner(ISOTROPIC, EQUAL)
    torch.testing.assert_close(matrix, EYE / (20 + 5 + 1 + 0.3), rtol=1e-12, atol=0)
    assert risk_of_step(ISOTROPIC, matrix, EQUAL) == pytest.approx(1.497719, abs=5e-7)


def test_general_step_is_the_closed_form_and_the_minimum():
    regression = general()
    s, t = regression.covariance, regression.task_covariance
    matrix = best_preconditioner(regression, EQUAL)
    expected = t @ torch.linalg.inv(21 * s @ t + (torch.trace(s @ t) + 0.3) * EYE)
    assert relative_rms(matrix, expected) < 1e-12
    best = risk_of_step(regression, matrix, EQUAL)
    by_hand = torch.trace(s @ t) + 0.3 - 20 * torch.trace(expected @ s @ t @ s)
    assert best == pytest.approx(by_hand.item(), rel=1e-12)
    for seed in range(5):
        other = matrix + 0.01 * randn(5, 5, seed=seed)
        assert risk_of_step(regression, other, EQUAL) > best
    for factor in (0.8, 1.2):
        rise = risk_of_step(regression, factor * matrix, EQUAL) - best
        assert rise == pytest.approx(0.04 * (regression.target_variance - best), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_operator_takes_the_step_of_gradient_descent(weighted):
    prompts = general().sample(7, torch.Generator().manual_seed(0))
    weights = 0.9 ** torch.arange(20, dtype=torch.float64) if weighted else EQUAL
    matrix = randn(5, 5, seed=1)
    found = predict_by_attention(prompts, matrix, weights)
    for b in range(7):
        beta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        loss = sum(
            weights[n] * (prompts.y[b, n] - prompts.x[b, n] @ beta) ** 2 / 2 for n in range(20)
        )
        (gradient,) = torch.autograd.grad(loss, beta)
        step = prompts.query[b] @ (-matrix @ gradient)
        assert found[b].item() == pytest.approx(step.item(), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    "regression",
    [general(), general(heavy_tails=True), general(persistence=0.9)],
    ids=["one task", "heavy tails", "drift"],
)
def test_sampled_risk_is_the_closed_form(regression):
    weights = torch.linspace(0.2, 1, 20, dtype=torch.float64)
    matrix = best_preconditioner(regression, weights) + 0.01 * randn(5, 5)
    step = Step("step", matrix, weights)
    risk, *_ = measure_risks("", regression, [step], 20_000, torch.Generator().manual_seed(0))
    assert risk.predicted is not None
    assert risk.sampling_error < 0.06 * risk.predicted
    assert abs(risk.sampled - risk.predicted) < 4 * risk.sampling_error


def test_unequal_weights_are_fewer_examples_when_there_is_one_task():
    assert relative_rms(best_example_weights(ISOTROPIC), EQUAL) < 1e-12
    weights = 0.8 ** torch.arange(20, dtype=torch.float64)
    matrix = best_preconditioner(ISOTROPIC, weights)
    effective = weights.sum().item() ** 2 / weights.square().sum().item()
    expected = 5.3 - effective * 5 / (effective + 6.3)
    assert risk_of_step(ISOTROPIC, matrix, weights) == pytest.approx(expected, rel=1e-12)


def test_best_weights_are_a_minimum_when_the_task_drifts():
    regression = replace(ISOTROPIC, persistence=0.9)
    weights = best_example_weights(regression)

    def best_risk(weights):
        return risk_of_step(regression, best_preconditioner(regression, weights), weights)

    assert best_risk(weights) < 0.9 * best_risk(EQUAL)
    for seed in range(5):
        assert best_risk(weights + 0.01 * randn(20, seed=seed)) > best_risk(weights)
    with pytest.raises(ValueError, match="must be a multiple of the identity: take"):
        best_example_weights(general())


def some_tokens(dim: int = 4, distribution="normal") -> Tokens:
    root = torch.eye(dim, dtype=torch.float64) + 0.2 * randn(dim, dim, seed=5)
    return Tokens(randn(dim, seed=6), root, randn(3, dim, seed=7), distribution)


def test_distances_are_those_of_the_definitions():
    tokens, count = some_tokens(), 9
    query = tokens.query(0.7)
    assert (query @ tokens.covariance @ query).item() == pytest.approx(0.7)
    centred = tokens.sample(3, count, torch.Generator().manual_seed(0))
    values, limit = tokens.values, tokens.values @ (tokens.mean + tokens.covariance @ query)
    squares = dict.fromkeys(PAIRS, 0.0)
    for draw in centred:
        x = draw + tokens.mean
        mean = sum(x) / count
        total = sum(math.exp(query @ each) for each in x)
        outputs = {
            "limit": limit,
            "softmax": sum(math.exp(query @ each) * values @ each for each in x) / total,
            "linear": values @ tokens.mean + sum((query @ u) * values @ u for u in draw) / count,
            "affine": sum((1 + query @ each) * values @ each for each in x) / count,
            "inline": values @ mean
            + sum((query @ (each - mean)) * values @ (each - mean) for each in x) / count,
        }
        for output, reference in PAIRS:
            distance = (outputs[output] - outputs[reference]).square().sum().item()
            squares[output, reference] += distance / 3
    found = measure_distances(tokens, [query], count, 3, torch.Generator().manual_seed(0))
    for each in found:
        expected = math.sqrt(squares[each.output, each.reference])
        assert each.rms == pytest.approx(expected, rel=1e-10), each.output


@pytest.mark.parametrize("v", [0.5, 1.3])
def test_constants_are_moments_by_quadrature(v):
    """One dimension, m = 0.4: the variance of what each token adds to the output's error."""
    nodes, chances = np.polynomial.hermite_e.hermegauss(80)
    chances = chances / chances.sum()
    one = torch.ones(1, 1, dtype=torch.float64)
    tokens = Tokens(0.4 * one[0], one, one)
    softmax = np.exp(v * nodes - v * v / 2) * (nodes - v)
    inline = nodes + nodes * v * nodes - v
    affine = (1 + v * (nodes + 0.4)) * (nodes + 0.4) - (0.4 + v)
    count = 10**6
    for (output, reference), error in {
        ("softmax", "limit"): softmax,
        ("inline", "limit"): inline,
        ("softmax", "inline"): softmax - inline,
        ("linear", "limit"): v * nodes * nodes - v,
        ("affine", "limit"): affine,
    }.items():
        mean = chances @ error
        expected = math.sqrt(mean**2 + (chances @ error**2 - mean**2) / count)
        found = predict_rms(output, reference, tokens, tokens.query(v * v), count)
        assert found == pytest.approx(expected, rel=1e-5), (output, reference)


def test_distances_are_the_predicted_ones_at_small_scores():
    tokens = some_tokens()
    queries = [tokens.query(0.25), tokens.query(1.0)]
    for each in measure_distances(tokens, queries, 1024, 600, torch.Generator().manual_seed(0)):
        assert each.rms == pytest.approx(each.predicted, rel=0.1), each


@pytest.mark.parametrize("distribution", ["exponential", "sign"])
def test_gap_is_the_gradient_of_the_log_moment_generating_function(distribution):
    tokens = some_tokens(4, distribution)
    entries = tokens.sample(2000, 50, torch.Generator().manual_seed(0)).flatten(0, 1)
    assert relative_rms(entries.T.cov(), tokens.covariance) < 0.05
    query = tokens.query(1.0).requires_grad_()
    u = tokens.root.T @ query
    log_moment = -u - torch.log1p(-u) if distribution == "exponential" else u.cosh().log()
    (limit,) = torch.autograd.grad(log_moment.sum(), query)
    query = query.detach()
    expected = (tokens.values @ (limit - tokens.covariance @ query)).norm().item()
    assert softmax_gap(tokens, query) == pytest.approx(expected, rel=1e-10)


def test_softmax_over_exponential_tokens_needs_small_scores():
    tokens = some_tokens(4, "exponential")
    with pytest.raises(ValueError, match=r"query .* must have R\^T a < 1"):
        softmax_gap(tokens, tokens.query(4.1))


def test_committed_curves_have_the_slopes_of_the_page():
    distances = read(Distance, "limit.csv")
    assert theory.fits_table(distances) in PAGE
    assert theory.gaps_table(distances) in PAGE
    for square in (0.25, 1.0):
        for output in ("softmax", "linear", "inline"):
            found = curve_of(distances, output, "limit", square)
            assert len(found) == 5
            assert slope(found) == pytest.approx(-0.5, abs=0.02)
            for each in found:
                assert each.rms == pytest.approx(each.predicted, rel=0.1)
    large = curve_of(distances, "softmax", "limit", 6.3)
    assert slope(large) > -0.4
    assert all(each.rms < 0.7 * each.predicted for each in large)


def test_committed_risks_are_those_of_the_page():
    risks = read(Risk, "regression.csv")
    table = theory.risks_table(risks).splitlines()
    quoted = [line for line in PAGE.splitlines() if line.endswith(" |") and "step" in line]
    assert len(quoted) >= 5
    assert set(quoted) <= set(table)
    for risk in risks:
        if risk.predicted is not None:
            assert abs(risk.sampled - risk.predicted) < 4 * risk.sampling_error, risk


def test_command_writes_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "TOKEN_COUNTS", (16, 32))
    for name, size in (("measure_regressions", 100), ("measure_limits", 10)):
        measure = getattr(theory, name)
        monkeypatch.setattr(theory, name, lambda measure=measure, size=size, **_: measure(size))
    monkeypatch.setattr("sys.argv", ["theory", str(tmp_path / "out")])
    assert theory.main() == 0
    assert "| isotropic | step | 1.4977 |" in capsys.readouterr().out
    names = {"summary.md", "regression.csv", "limit.csv"}
    names |= {"regression.png", "limit.png", "inline.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["theory", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        theory.main()
    assert "must be a folder one can write to" in capsys.readouterr().err

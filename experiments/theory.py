"""The three statements of docs/theory.md, measured with the operator, each with a picture.

``python -m experiments.theory [OUTPUT_FOLDER]`` writes summary.md, and per statement a table and a
picture, into OUTPUT_FOLDER (docs/results/theory). Every number is drawn from a fixed seed. Under
a minute of CPU time.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import torch

from ds_linclip.provenance import run_facts
from experiments.in_context import (
    Regression,
    Risk,
    Step,
    best_example_weights,
    best_preconditioner,
    measure_risks,
)
from experiments.theory_figures import draw_inline, draw_limit, draw_regression
from experiments.token_limit import (
    PAIRS,
    Distance,
    Distribution,
    Tokens,
    curve_of,
    measure_distances,
    slope,
)
from linclip_eval.results import markdown_table, write_report

__all__ = ["fits_table", "gaps_table", "measure_limits", "measure_regressions", "risks_table"]

FOLDER = Path("docs/results/theory")
DIM, NOISE, EXAMPLES = 5, 0.3, 20
EXAMPLE_COUNTS = (5, 10, 20, 40, 80, 160)
FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
PERSISTENCES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6)
TOKEN_DIM = 8
TOKEN_COUNTS = (64, 256, 1024, 4096, 16384)
V_SQUARED = (0.25, 1.0, 2.0, 6.3)
OTHER_V_SQUARED = (0.25, 1.0)
NOT_NORMAL: tuple[Distribution, ...] = ("exponential", "sign")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("output", type=Path, nargs="?", default=FOLDER)
    output = parser.parse_args().output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"must be a folder one can write to: {error.strerror}"
        parser.exit(2, f"error: output ({output}) {reason}\n")
    command = f"python -m experiments.theory {output}"
    facts = run_facts("cpu", command, measured=("experiments", "kernels/linclip_kernels"))
    risks = measure_regressions(num_prompts=100_000)
    distances = measure_limits(num_draws=1000)
    sections = [
        "Statements, derivations and limits: [docs/theory.md](../../theory.md). Float64, fixed "
        "seeds; ± is one standard error.",
        "## Linear attention is one step of gradient descent",
        risks_table(risks),
        "![Risk over examples, factor and persistence](regression.png)",
        "## Distance of attention over random tokens from its linear limit",
        "Slope of log RMS over log tokens, and RMS over prediction (geometric mean over 64 to "
        "16384 tokens).",
        fits_table(distances),
        "![Softmax and linear attention](limit.png)",
        "## InLine and softmax when tokens are not normal",
        gaps_table(distances),
        "![InLine](inline.png)",
    ]
    print(
        write_report(
            output,
            title="Theory of linear attention",
            sections=sections,
            facts=facts,
            tables={"regression.csv": risks, "limit.csv": distances},
            float_format=".9g",
            figures={
                "regression.png": draw_regression(risks),
                "limit.png": draw_limit(distances),
                "inline.png": draw_inline(distances),
            },
        )
    )
    return 0


def measure_regressions(num_prompts: int) -> list[Risk]:
    """Measure the risk of the step in every setting, each on as many prompts."""
    identity = torch.eye(DIM, dtype=torch.float64)
    plain = Regression(identity, identity, NOISE, EXAMPLES)
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, DIM, DIM, dtype=torch.float64, generator=generator)
    covariances = roots @ roots.mT / DIM + 0.1 * identity
    general = Regression(covariances[0], covariances[1], NOISE, EXAMPLES)
    settings = [
        *(("isotropic", replace(plain, num_examples=count)) for count in EXAMPLE_COUNTS),
        ("general", general),
        ("heavy tails", replace(general, heavy_tails=True)),
        *(("drift", replace(plain, persistence=each)) for each in PERSISTENCES),
    ]
    return [
        risk
        for setting, regression in settings
        for risk in measure_risks(
            setting, regression, _steps_of(setting, regression), num_prompts, generator
        )
    ]


def _steps_of(setting: str, regression: Regression) -> list[Step]:
    """Return the steps to compare in a setting."""
    equal = torch.ones(regression.num_examples, dtype=torch.float64)
    best = best_preconditioner(regression, equal)
    match setting:
        case "heavy tails":
            normal = best_preconditioner(replace(regression, heavy_tails=False), equal)
            return [Step("step", best, equal), Step("step for normal x", normal, equal)]
        case "drift":
            weights = best_example_weights(regression)
            weighted = Step("weighted", best_preconditioner(regression, weights), weights)
            return [Step("step", best, equal), weighted]
        case _:
            factors = FACTORS if regression.num_examples == EXAMPLES else (1.0,)
            return [Step("step", best, equal, factor) for factor in factors]


def measure_limits(num_draws: int) -> list[Distance]:
    """Measure distances over all numbers of tokens, for normal tokens and for others."""
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(2, TOKEN_DIM, TOKEN_DIM, dtype=torch.float64, generator=generator)
    scales = torch.linspace(0.5, 1.5, TOKEN_DIM, dtype=torch.float64).sqrt()
    root = torch.linalg.qr(square[0])[0] * scales
    mean = root.sum(1) / TOKEN_DIM**0.5  # a.m = v
    normal = Tokens(mean, root, square[1] / TOKEN_DIM**0.5)
    settings: list[tuple[Tokens, tuple[float, ...]]] = [(normal, V_SQUARED)]
    settings += [(replace(normal, distribution=each), OTHER_V_SQUARED) for each in NOT_NORMAL]
    return [
        distance
        for tokens, squares in settings
        for count in TOKEN_COUNTS
        for distance in measure_distances(
            tokens, [tokens.query(each) for each in squares], count, num_draws, generator
        )
    ]


def risks_table(risks: Sequence[Risk]) -> str:
    """Return the risks at 20 examples as a Markdown table."""
    rows = []
    for risk in risks:
        repeated = risk.setting == "drift" and risk.persistence == 1  # the isotropic setting
        if repeated or risk.num_examples != EXAMPLES or risk.factor not in (0.8, 1.0, 1.2):
            continue
        times = "" if risk.factor == 1 else f" times {risk.factor:g}"
        drift = f", correlation {risk.persistence:g}" if risk.setting == "drift" else ""
        predicted = "" if risk.predicted is None else f"{risk.predicted:.4f}"
        sampled = f"{risk.sampled:.3f} ± {risk.sampling_error:.3f}"
        rows.append([f"{risk.setting}{drift}", risk.predictor + times, predicted, sampled])
    header = ["tokens and tasks", "predictor", "predicted risk", "sampled risk"]
    return markdown_table(header, rows, align="llrr")


def fits_table(distances: Sequence[Distance]) -> str:
    """Return slopes over tokens, and measured over predicted distances, as a Markdown table."""
    rows = []
    for output, reference in PAIRS:
        cells = []
        for square in V_SQUARED:
            found = curve_of(distances, output, reference, square)
            ratio = geometric_mean([each.rms / each.predicted for each in found])
            cells.append(f"{slope(found):.3f}, {ratio:.3f}")
        rows.append([f"{output} from {reference}", *cells])
    return markdown_table(["slope, ratio", *(f"v² = {each:g}" for each in V_SQUARED)], rows)


def gaps_table(distances: Sequence[Distance]) -> str:
    """Return the distances at most tokens when they are not normal, as a Markdown table."""
    rows = []
    for distribution in NOT_NORMAL:
        for square in OTHER_V_SQUARED:
            cells = []
            for output, reference in (("inline", "limit"), ("softmax", "inline")):
                last = curve_of(distances, output, reference, square, distribution)[-1]
                cells.append(f"{last.rms:.4f} ± {last.rms_error:.1g}")
            rows.append([distribution, f"{square:g}", *cells, f"{last.gap:.4f}"])
    header = ["entries", "v²", "inline from limit", "softmax from inline", "predicted gap"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())

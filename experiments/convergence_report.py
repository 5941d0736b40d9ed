"""Table and picture of a convergence study: runs of several variants and seeds.

Every run is one JSON object on a line of its own, with the fields of :class:`ConvergenceRun`.
Intervals are two-sided 95 % Student t-intervals of the mean over seeds. Sequence lengths are
strata: the spread over seeds may differ between them many times, so it is never estimated from both
together.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import sem
from scipy.stats import t as student_t

from linclip_eval.plotting import COLOURS, INK, MUTED, add_legend, dress, new_figure
from linclip_eval.results import markdown_table

__all__ = ["ConvergenceRun", "compare", "draw", "read_runs", "summarise", "to_markdown"]


@dataclass(kw_only=True, frozen=True)
class ConvergenceRun:
    """Scores of one finished run."""

    variant: str
    seed: int
    #: Tokens of the image tower, class token included.
    num_tokens: int
    #: Zero-shot accuracies in [0, 1].
    top1: float
    top5: float
    #: Training loss at the end.
    loss: float
    #: Size of the model, and seconds of the whole run; None where they were not recorded.
    num_parameters: int | None = None
    seconds: float | None = None


@dataclass(kw_only=True, frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval (None with a single seed)."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return the interval of the mean; not a number where a value is not."""
        if len(values) < 2:
            return cls(mean=values[0], half_width=None)
        quantile = student_t.ppf(0.975, len(values) - 1)
        return cls(mean=statistics.fmean(values), half_width=float(quantile * sem(values)))

    @classmethod
    def of_strata(cls, strata: Sequence[Sequence[float]]) -> "Interval":
        """Return the interval of the mean over strata of their means, each with its own spread.

        The degrees of freedom are those of Welch and Satterthwaite.
        """
        mean = statistics.fmean(map(statistics.fmean, strata))
        if min(map(len, strata)) < 2:
            return cls(mean=mean, half_width=None)
        errors = [sem(values) ** 2 for values in strata]  # squared
        if not any(errors):
            return cls(mean=mean, half_width=0.0)
        degrees = [e**2 / (len(values) - 1) for e, values in zip(errors, strata, strict=True)]
        quantile = student_t.ppf(0.975, sum(errors) ** 2 / sum(degrees))
        return cls(mean=mean, half_width=float(quantile * math.sqrt(sum(errors)) / len(strata)))

    def text(self, digits: int, factor: float = 1.0) -> str:
        """Return mean and half width, multiplied by ``factor``."""
        numbers = [self.mean] if self.half_width is None else [self.mean, self.half_width]
        return " ± ".join(f"{factor * number:.{digits}f}" for number in numbers)


@dataclass(kw_only=True, frozen=True)
class VariantSummary:
    """One variant at one sequence length, over its seeds."""

    variant: str
    num_tokens: int
    num_seeds: int
    top1: Interval
    top5: Interval
    loss: Interval
    num_parameters: int | None = None
    #: Median over the seeds.
    seconds: float | None = None


def read_runs(path: str | Path) -> list[ConvergenceRun]:
    """Read runs from JSON lines; keys beyond the fields of :class:`ConvergenceRun` are ignored.

    Raises:
        ValueError: for a line that is no JSON object or lacks a field, or a file without runs.
    """
    runs = []
    names = [field.name for field in fields(ConvergenceRun)]
    required = [field.name for field in fields(ConvergenceRun) if field.default is MISSING]
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            values = {name: entry[name] for name in required}
            values |= {name: entry[name] for name in names if name in entry}
            runs.append(ConvergenceRun(**values))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: must be JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} ({line}) must hold {', '.join(required)}"
            ) from error
    if not runs:
        raise ValueError(f"{path} (0 runs) must hold at least one run")
    return runs


def summarise(runs: Iterable[ConvergenceRun]) -> list[VariantSummary]:
    """Return mean and interval of every variant, by sequence length, then order of appearance.

    Raises:
        ValueError: for no runs, or two with the same variant, length and seed.
    """
    groups: dict[tuple[int, str], dict[int, ConvergenceRun]] = {}
    for run in runs:
        group = groups.setdefault((run.num_tokens, run.variant), {})
        if run.seed in group:
            raise ValueError(
                f"seed ({run.seed}) must be unique within {run.variant}, {run.num_tokens} tokens"
            )
        group[run.seed] = run
    if not groups:
        raise ValueError("runs ([]) must hold at least one run")
    return [
        VariantSummary(
            variant=variant,
            num_tokens=num_tokens,
            num_seeds=len(group),
            **{
                score: Interval.of([getattr(run, score) for run in group.values()])
                for score in ("top1", "top5", "loss")
            },
            num_parameters=next(iter(group.values())).num_parameters,
            seconds=_median([run.seconds for run in group.values()]),
        )
        for (num_tokens, variant), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def differences(
    runs: Iterable[ConvergenceRun], variant: str, baseline: str, score: str
) -> dict[int, list[float]]:
    """Return by sequence length how far a score lies from the baseline's with the same seed."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for run in runs:
        found.setdefault((run.num_tokens, run.seed), {})[run.variant] = getattr(run, score)
    pairs: dict[int, list[float]] = {}
    for (num_tokens, _), scores in sorted(found.items()):
        if variant in scores and baseline in scores:
            pairs.setdefault(num_tokens, []).append(scores[variant] - scores[baseline])
    return pairs


def compare(runs: Sequence[ConvergenceRun], baseline: str, score: str, digits: int) -> str:
    """Return a Markdown table of the differences of every variant to a baseline, paired by seed.

    Args:
        score: A field of the runs; accuracies are shown in percentage points.
    """
    factor = 1 if score == "loss" else 100
    lengths = sorted({run.num_tokens for run in runs})
    cells = []
    for variant in dict.fromkeys(run.variant for run in runs):
        pairs = differences(runs, variant, baseline, score)
        if variant == baseline or not pairs:
            continue
        row = [Interval.of(pairs[n]).text(digits, factor) if n in pairs else "" for n in lengths]
        if len(lengths) > 1:
            is_whole = len(pairs) == len(lengths)
            joint = Interval.of_strata(list(pairs.values())).text(digits, factor)
            row.append(joint if is_whole else "")
        cells.append([variant, *row])
    header = [f"{score} minus that of {baseline}", *(f"{n} tokens" for n in lengths)]
    header += ["all lengths"] * (len(lengths) > 1)
    return markdown_table(header, cells, align="l" + "r" * (len(header) - 1)) + "\n"


def to_markdown(summaries: Sequence[VariantSummary]) -> str:
    """Return a Markdown table, one row per variant and sequence length, accuracies in percent."""
    cells = [
        [
            *(row.num_tokens, row.variant, row.num_seeds),
            *(row.top1.text(1, factor=100), row.top5.text(1, factor=100), row.loss.text(3)),
        ]
        for row in summaries
    ]
    header = ["tokens", "variant", "seeds", "top-1, %", "top-5, %", "loss"]
    if any(row.num_parameters for row in summaries):
        header += ["parameters, k", "seconds"]
        for cell, row in zip(cells, summaries, strict=True):
            cell.append("" if row.num_parameters is None else f"{1e-3 * row.num_parameters:.0f}")
            cell.append("" if row.seconds is None else f"{row.seconds:.0f}")
    return markdown_table(header, cells, align="rl" + "r" * (len(header) - 2)) + "\n"


def draw(runs: Sequence[ConvergenceRun], baseline: str) -> Figure:
    """Draw top-1 accuracy of every variant: a dot per seed, the mean, and its 95 % interval.

    There is one panel per sequence length, with the variants in the order of their appearance, and
    below it one of the differences to a baseline, paired by seed.
    """
    lengths = sorted({run.num_tokens for run in runs})
    variants = list(dict.fromkeys(run.variant for run in runs))
    figure = new_figure(2.4 + 3.9 * len(lengths), 1.4 + 1.0 * len(variants))
    panels = figure.subplots(2, len(lengths), sharex="row", sharey=True, squeeze=False)
    for column, num_tokens in enumerate(lengths):
        upper, lower = panels[:, column]
        dress(upper, f"{num_tokens} tokens", xlabel="zero-shot top-1, %")
        dress(lower, "", xlabel=f"points above {baseline}, same seed")
        lower.axvline(0, color=MUTED, linewidth=1)
        for row, variant in enumerate(variants):
            own = [r for r in runs if (r.num_tokens, r.variant) == (num_tokens, variant)]
            _draw_row(upper, row, [run.top1 for run in own])
            if variant != baseline:
                _draw_row(
                    lower, row, differences(runs, variant, baseline, "top1").get(num_tokens, [])
                )
        for axes in (upper, lower):
            axes.grid(visible=False, axis="y")
            axes.set_yticks(range(len(variants)), variants, fontsize=9.5, color=INK)
            axes.set_ylim(len(variants) - 0.5, -0.5)
            axes.use_sticky_edges = False
            axes.margins(x=0.06)
        upper.set_xlim(max(0, upper.get_xlim()[0]), min(101, upper.get_xlim()[1]))
    add_legend(
        figure,
        [
            Line2D([], [], marker="o", linestyle="", markersize=5, color=MUTED, label="one seed"),
            Line2D([], [], marker="|", linestyle="", mew=2, color=MUTED, label="mean"),
            Patch(facecolor=MUTED, alpha=0.3, label="95 % t-interval of the mean"),
        ],
    )
    return figure


def _draw_row(axes: Axes, row: int, scores: Sequence[float]) -> None:
    if not scores:
        return
    interval, colour = Interval.of(scores), COLOURS[row % len(COLOURS)]
    mean, reach = 100 * interval.mean, 100 * (interval.half_width or 0)
    axes.barh(row, 2 * reach, left=mean - reach, height=0.34, color=colour, alpha=0.25)
    axes.vlines(mean, row - 0.17, row + 0.17, color=colour, linewidth=2)
    # Spread a little, so that equal scores stay visible.
    places = np.linspace(row - 0.1, row + 0.1, len(scores)) if len(scores) > 1 else [row]
    dots = [100 * score for score in scores]
    axes.scatter(dots, places, s=26, color=colour, edgecolor="white", linewidth=0.8, zorder=3)
    axes.text(mean, row - 0.2, f"{mean:.1f}", ha="center", va="bottom", fontsize=8, color=INK)

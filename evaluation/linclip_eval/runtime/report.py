"""Report of a runtime measurement: tables of growth, ratios and memory, numbers and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

from ds_linclip.process.number_text import format_figure
from linclip_eval.results import markdown_table, write_report
from linclip_eval.runtime.figure import draw_memory, draw_times
from linclip_eval.runtime.fit import CallCost, RuntimePoint, Scaling
from linclip_eval.runtime.subjects import SUBJECTS

__all__ = ["comparison_sections", "tables_by_tokens", "write_runtime_report"]


def write_runtime_report(
    folder: Path,
    points: Sequence[RuntimePoint],
    *,
    facts: Mapping[str, str],
    conditions: str,
    runs: int,
) -> str:
    """Write results.csv, results.json, figure.png, memory.png and summary.md; return its text.

    Args:
        folder: Created where it is missing.
        points: At least one.
        facts: The result of :func:`ds_linclip.provenance.run_facts`.
        conditions: Limits and the like, as a sentence.
        runs: Number of runs that were requested at every point.
    """
    scaling = Scaling(points)
    rows = [_row(point) for point in points]
    measured = [point.measured for point in points if point.measured]
    complete = sum(cost.runs == runs for cost in measured)
    least = min((cost.runs for cost in measured), default=0)
    return write_report(
        folder,
        title="Softmax and linear attention over the number of tokens",
        sections=[
            "Time and peak memory of one call on one sequence of N tokens (batch 1): a forward "
            "without gradients (inference), a forward and backward (training). Times are medians; "
            "a range is that of the quartiles. The three attentions are called in turn.",
            f"{conditions} All {runs} runs were made at {complete} of {len(measured)} points, "
            f"fewer where they took too long: at least {least}. results.csv has their number, the "
            "quartiles and the memory of every point.",
            "\n".join(f"- **{what}**: {SUBJECTS[what]}" for what in scaling.attentions),
            "![Time over the number of tokens](figure.png)",
            "![Peak memory over the number of tokens](memory.png)",
            *comparison_sections(
                scaling,
                "the last decade of each line: from a tenth of its largest N on. Outside "
                "`attention` the projections and the MLP cost O(N) too, so that softmax only comes "
                "near 2 there",
            ),
        ],
        facts=facts,
        tables={"results.csv": rows},
        figures={"figure.png": draw_times(scaling), "memory.png": draw_memory(scaling)},
        numbers={"conditions": conditions, "points": rows, "growth": list(_growth(scaling))},
    )


def comparison_sections(scaling: Scaling, fitted: str) -> list[str]:
    """Return the sections of a summary that compare linear attention with softmax.

    ``fitted`` says which numbers of tokens slopes are fitted to.
    """

    def ratio(what: str, direction: str, num_tokens: int, linear: CallCost) -> str:
        softmax = scaling.fastest_softmax(what, direction).get(num_tokens)
        if softmax is None:
            return "-"
        low, high = softmax.low / linear.high, softmax.high / linear.low
        middle = softmax.seconds / linear.seconds
        return f"{format_figure(middle)} ({format_figure(low)} to {format_figure(high)})"

    def peak(what: str, direction: str, num_tokens: int, cost: CallCost) -> str:
        return format_figure(cost.peak_bytes / 2**20)

    return [
        "## Growth",
        "Exponent of N in the time with its 95 % interval, by least squares in log-log over "
        f"{fitted}; and the number of tokens from which linear attention is faster than softmax, "
        "interpolated in log-log.",
        _growth_table(scaling),
        "## Time of the fastest softmax over that of linear attention",
        "The range is from the lower end of one to the upper end of the other, and back.",
        *tables_by_tokens(scaling, ratio, linear_only=True),
        "## Peak memory of a call, MiB",
        "Most memory that torch's allocator has given out at once during one call, beyond inputs "
        "and weights.",
        *tables_by_tokens(scaling, peak),
        "## Left out",
        _skipped_table(scaling),
    ]


def tables_by_tokens(
    scaling: Scaling, cell: Callable[[str, str, int, CallCost], str], *, linear_only: bool = False
) -> Iterator[str]:
    """Yield a heading and a table, N by attention, for every subject and direction.

    Args:
        cell: Subject, direction, number of tokens and cost -> text; called where a cost was
            measured.
    """
    for what, direction in product(scaling.attentions, scaling.directions):
        names = scaling.linear(what) if linear_only else scaling.attentions[what]
        lines = [scaling.line(what, direction, name) for name in names]
        rows = [
            [n, *(cell(what, direction, n, line[n]) if n in line else "-" for line in lines)]
            for n in scaling.tokens
        ]
        yield f"### {what}, {direction}"
        yield markdown_table(["N", *names], rows)


def _row(point: RuntimePoint) -> dict[str, Any]:
    no_cost = {field.name: None for field in fields(CallCost)}
    return {
        "what": point.what,
        "attention": point.attention,
        "direction": point.direction,
        "tokens": point.num_tokens,
        **(asdict(point.measured) if point.measured else no_cost),
        "skipped": point.skipped,
    }


def _growth(scaling: Scaling) -> Iterator[dict[str, Any]]:
    """Yield slope and crossover of every line, None where it has none."""
    for what, direction in product(scaling.attentions, scaling.directions):
        for attention in scaling.attentions[what]:
            place = what, direction, attention
            slope = scaling.slope(*place)
            yield {
                "what": what,
                "direction": direction,
                "attention": attention,
                "slope": slope and asdict(slope),
                "fitted_tokens": scaling.fitted(*place),
                "crossover": scaling.crossover(*place),
            }


def _growth_table(scaling: Scaling) -> str:
    rows = []
    for what, names in scaling.attentions.items():
        for name in names:
            places = [(what, direction, name) for direction in scaling.directions]
            slopes = [_slope(scaling, *place) for place in places]
            rows.append(
                [f"{what}, {name}", *slopes, *(_crossover(scaling, *place) for place in places)]
            )
    header = [f"{kind}, {d}" for kind in ("exponent", "faster from N") for d in scaling.directions]
    return markdown_table(["", *header], rows)


def _slope(scaling: Scaling, *place: str) -> str:
    slope, lengths = scaling.slope(*place), scaling.fitted(*place)
    if slope is None:
        return "fewer than 3 lengths"
    interval = f"{slope.exponent:.2f} ({slope.low:.2f} to {slope.high:.2f})"
    return f"{interval}, N = {lengths[0]} to {lengths[-1]}"


def _crossover(scaling: Scaling, what: str, direction: str, attention: str) -> str:
    if attention not in scaling.linear(what):
        return ""
    crossing = scaling.crossover(what, direction, attention)
    if crossing is not None:
        return f"{crossing:.0f}"
    softmax = scaling.fastest_softmax(what, direction)
    linear = scaling.line(what, direction, attention)
    common = sorted(softmax.keys() & linear.keys())
    if not common:
        return "not measured"
    is_faster = softmax[common[-1]].seconds > linear[common[-1]].seconds
    return f"below {common[0]}" if is_faster else f"above {common[-1]}"


def _skipped_table(scaling: Scaling) -> str:
    """Return a line for all lengths of one kind of point, with the reason of the shortest."""
    skipped: dict[tuple[str, str, str], list[RuntimePoint]] = {}
    for point in scaling.points:
        if point.skipped:
            place = point.what, point.direction, point.attention
            skipped.setdefault(place, []).append(point)
    lines = [
        [*place, ", ".join(str(point.num_tokens) for point in points), points[0].skipped]
        for place, points in skipped.items()
    ]
    header = ["what", "direction", "attention", "N", "why, at the first"]
    return markdown_table(header, lines) if lines else "Nothing."

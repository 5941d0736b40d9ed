"""The report of a runtime measurement: numbers, tables and pictures in a folder."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from linclip_eval.results import markdown_table, write_results
from linclip_eval.runtime.figure import draw_memory, draw_times
from linclip_eval.runtime.fit import Measured, Point, Scaling, crossover
from linclip_eval.runtime.subjects import SUBJECTS

__all__ = ["write_report"]

_COLUMNS = (
    *("what", "attention", "direction", "tokens", "seconds", "low", "high", "runs"),
    *("peak_bytes", "skipped"),
)
_LINEAR = ("Eq. 7", "Eq. 4")


def write_report(
    folder: Path,
    points: Sequence[Point],
    *,
    command: Sequence[str],
    device: torch.device,
    conditions: str,
    runs: int,
) -> None:
    """Write results.csv, results.json, figure.png, memory.png and summary.md.

    Args:
        folder: Made where it is missing.
        points: At least one.
        command: The subcommand of linclip-eval and its arguments.
        device: On which it was measured.
        conditions: Limits and the like, as a sentence.
        runs: How many were asked for at every point.

    Raises:
        OSError: when the folder cannot be written.
    """
    scaling = Scaling(points)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(point) for point in points]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw_times(scaling).savefig(folder / "figure.png")
    draw_memory(scaling).savefig(folder / "memory.png")
    write_results(
        folder,
        command=command,
        title="Softmax and linear attention over the number of tokens",
        body=_summary(scaling, conditions, runs),
        numbers={"conditions": conditions, "points": rows, "growth": list(_growth(scaling))},
        device=device,
    )


def _row(point: Point) -> dict[str, Any]:
    return {
        "what": point.what,
        "attention": point.attention,
        "direction": point.direction,
        "tokens": point.num_tokens,
        **(asdict(point.measured) if point.measured else {}),
        "skipped": point.skipped,
    }


def _growth(scaling: Scaling) -> Iterator[dict[str, Any]]:
    """Slope and crossover of every line, where it has them."""
    for what, direction in product(scaling.subjects, scaling.directions):
        softmax = scaling.seconds(what, direction, "softmax")
        for attention in scaling.attentions:
            place = what, direction, attention
            slope = scaling.slope(*place)
            yield {
                "what": what,
                "direction": direction,
                "attention": attention,
                "slope": slope and asdict(slope),
                "fitted_tokens": scaling.fitted(*place),
                "crossover": (
                    crossover(softmax, scaling.seconds(*place)) if attention in _LINEAR else None
                ),
            }


def _summary(scaling: Scaling, conditions: str, runs: int) -> str:
    measured = [point.measured for point in scaling.points if point.measured]
    complete = sum(found.runs == runs for found in measured)
    least = min((found.runs for found in measured), default=0)
    sections = [
        "Time and peak memory of one call on one sequence of N tokens (batch 1): a forward without "
        "gradients (inference), a forward and backward (training). Times are medians; a range is "
        "that of the quartiles. The three attentions are called in turn.",
        f"{conditions} All {runs} runs were made at {complete} of {len(measured)} points, fewer "
        f"where they took too long: at least {least}. results.csv has their number, "
        "the quartiles and the memory of every point.",
        "\n".join(f"- **{what}**: {SUBJECTS[what]}" for what in scaling.subjects),
        "![Time over the number of tokens](figure.png)",
        "## Growth",
        "Exponent of N in the time with its 95 % interval, by least squares in log-log over the "
        "last decade of each line: from a tenth of its largest N on. Outside `attention` the "
        "projections and the MLP cost O(N) too, so that softmax only comes near 2 there.",
        _growth_table(scaling),
        "## Crossover",
        "Number of tokens from which on linear attention is faster than softmax, interpolated in "
        "log-log.",
        _crossover_table(scaling),
        "## Time of softmax over that of linear attention",
        "The range is from the lower quartile of one to the upper quartile of the other, and back.",
        *_ratio_tables(scaling),
        "## Peak memory of a call, MiB",
        "The most that torch's allocator has given out at once during one call, beyond inputs and "
        f"weights: {' / '.join(scaling.attentions)}.",
        "![Peak memory over the number of tokens](memory.png)",
        *_memory_tables(scaling),
        "## Left out",
        _skipped_table(scaling),
    ]
    return "\n\n".join(sections)


def _growth_table(scaling: Scaling) -> str:
    lines = []
    for what, direction in product(scaling.subjects, scaling.directions):
        line = [f"{what}, {direction}"]
        for attention in scaling.attentions:
            slope = scaling.slope(what, direction, attention)
            if slope is None:
                line.append("fewer than 3 lengths")
                continue
            fitted = scaling.fitted(what, direction, attention)
            line.append(
                f"{slope.exponent:.2f} ({slope.low:.2f} to {slope.high:.2f}), N = {fitted[0]} to "
                f"{fitted[-1]}"
            )
        lines.append(line)
    return markdown_table(["", *scaling.attentions], lines)


def _crossover_table(scaling: Scaling) -> str:
    lines = []
    for what, direction in product(scaling.subjects, scaling.directions):
        softmax = scaling.seconds(what, direction, "softmax")
        cells = (_crossover(softmax, scaling.seconds(what, direction, name)) for name in _LINEAR)
        lines.append([f"{what}, {direction}", *cells])
    return markdown_table(["", *_LINEAR], lines)


def _crossover(softmax: Mapping[int, float], linear: Mapping[int, float]) -> str:
    place = crossover(softmax, linear)
    if place is not None:
        return f"{place:.0f}"
    common = sorted(softmax.keys() & linear.keys())
    if not common:
        return "not measured"
    is_faster = softmax[common[-1]] > linear[common[-1]]
    which = "linear is faster throughout" if is_faster else "softmax is faster at the end"
    return f"none in the measured range, {common[0]} to {common[-1]}: {which}"


def _ratio_tables(scaling: Scaling) -> Iterator[str]:
    for direction, attention in product(scaling.directions, _LINEAR):
        lines = []
        for num_tokens in scaling.tokens:
            cells = []
            for what in scaling.subjects:
                softmax = scaling.line(what, direction, "softmax").get(num_tokens)
                linear = scaling.line(what, direction, attention).get(num_tokens)
                cells.append(_ratio(softmax, linear) if softmax and linear else "-")
            lines.append([str(num_tokens), *cells])
        yield f"### {direction}, {attention}"
        yield markdown_table(["N", *scaling.subjects], lines)


def _ratio(above: Measured, below: Measured) -> str:
    low, high = above.low / below.high, above.high / below.low
    return f"{_digits(above.seconds / below.seconds)} ({_digits(low)} to {_digits(high)})"


def _memory_tables(scaling: Scaling) -> Iterator[str]:
    for direction in scaling.directions:
        lines = []
        for num_tokens in scaling.tokens:
            cells = []
            for what in scaling.subjects:
                found = [
                    scaling.line(what, direction, attention).get(num_tokens)
                    for attention in scaling.attentions
                ]
                peaks = (_digits(one.peak_bytes / 2**20) if one else "-" for one in found)
                cells.append(" / ".join(peaks))
            lines.append([str(num_tokens), *cells])
        yield f"### {direction}"
        yield markdown_table(["N", *scaling.subjects], lines)


def _skipped_table(scaling: Scaling) -> str:
    """A line for all lengths of one kind of point, with the reason of the shortest."""
    lines = []
    for place in product(scaling.subjects, scaling.directions, scaling.attentions):
        points = [
            point
            for point in scaling.points
            if (point.what, point.direction, point.attention) == place and point.skipped
        ]
        if points:
            lengths = ", ".join(str(point.num_tokens) for point in points)
            lines.append([*place, lengths, points[0].skipped])
    header = ["what", "direction", "attention", "N", "why, at the first"]
    return markdown_table(header, lines) if lines else "Nothing."


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

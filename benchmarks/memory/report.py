"""Report of bench_memory.py: tables, a picture and a verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from linclip_eval.plotting import (
    ATTENTION_COLOURS,
    INK,
    LINEAR,
    SOFTMAX,
    add_legend,
    dress,
    new_figure,
)
from linclip_eval.results import markdown_table, write_report

__all__ = ["Row", "is_as_planned", "layout_name", "totals", "write_memory_report"]

#: A line of memory.csv, one rank of one layout, in bytes: "kept" is between steps, "step" at the
#: fullest moment of one; "planned" is what the planner predicts, "process" the memory of the whole
#: process, the others that of tensors.
Row = dict[str, Any]
#: Largest relative difference of tensors between steps from the plan.
TOLERANCE = 0.03
MIB = 2**20
#: Kinds of tensors, and their colours.
KINDS = {
    "weights": LINEAR,
    "optimizer": ATTENTION_COLOURS["Eq. 4"],
    "gradients": SOFTMAX,
    "buckets": "#9ca3af",
    "activations": "#5aa469",
}
NOTES = """\
- Tensors between steps: bytes of the storages of live tensors that Python knows of, each once.
- Tensors in a step: the most that torch's allocator has given out at any time, activations, gloo's
  copies and what operators need inside included.
- Process: private memory between steps, and the growth of the peak resident set in a step, from
  before the model was built. It has the interpreter's own memory, the allocator's record and what
  is kept for reuse as well; buckets that are allocated and never filled are not resident.
- The plan is that of ds_linclip/planner/plan.py, which a run logs at its start, TensorBoard shows
  and `linclip plan` prints."""


def layout_name(row: Row) -> str:
    ranks = f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    micro = f", {row['micro_batches']} micro-batches" if row["micro_batches"] > 1 else ""
    return f"{row['precision']}, {ranks}, ZeRO-{row['stage']}{micro}"


def totals(row: Row, moment: str) -> tuple[int, int]:
    """Return the bytes of all tensors, as planned and as measured, at one moment."""
    if moment == "step":
        return sum(row[f"step_{kind}_planned"] for kind in KINDS), row["step"]
    return row["kept_planned"], sum(row.get(f"kept_{kind}", 0) for kind in (*KINDS, "other"))


def is_as_planned(rows: Sequence[Row]) -> bool:
    """Return whether the tensors between steps are those of the plan, on every rank."""
    sizes = (totals(row, "kept") for row in rows)
    return all(abs(tensors / planned - 1) <= TOLERANCE for planned, tensors in sizes)


def write_memory_report(folder: Path, facts: dict[str, str], rows: Sequence[Row]) -> str:
    """Write memory.csv, memory.png and summary.md, whose text is returned.

    Args:
        folder: Created where it is missing.
        facts: Conditions of the run; see :func:`linclip_eval.results.write_report`.
        rows: One for every rank of every layout.
    """
    by_layout: dict[str, Row] = {}
    for row in sorted(rows, key=lambda each: each["step"]):
        by_layout[layout_name(row)] = row
    fullest = [by_layout[name] for name in dict.fromkeys(map(layout_name, rows))]
    size = max(row["num_parameters"] for row in rows)
    return write_report(
        folder,
        title=f"Memory of a rank, {size / 1e6:.1f} M parameters",
        sections=[
            "MiB of the rank that has most in a step.",
            "![Memory of a rank in every layout](memory.png)",
            "## Between steps",
            _table(fullest, "kept", ()),
            "## At the fullest moment of a step",
            "By kind: the plan.",
            _table(fullest, "step", tuple(KINDS)),
            "## How to read this",
            NOTES,
        ],
        facts=facts,
        tables={"memory.csv": rows},
        figures={"memory.png": _draw(fullest)},
    )


def _table(rows: Sequence[Row], moment: str, kinds: Sequence[str]) -> str:
    lines = []
    for row in rows:
        planned, tensors = totals(row, moment)
        share = f"{tensors / planned:.3f}" if moment == "kept" else f"{tensors / planned:.2f}"
        sizes = _mib(planned), _mib(tensors), share, _mib(row[f"{moment}_process"])
        by_kind = (_mib(row[f"{moment}_{kind}_planned"]) for kind in kinds)
        lines.append([layout_name(row), *sizes, *by_kind])
    header = ["layout", "plan", "tensors", "tensors / plan", "process", *kinds]
    return markdown_table(header, lines)


def _draw(rows: Sequence[Row]) -> Figure:
    """Draw the plan left of the tensors, one of them by kind; the process as a mark."""
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure = new_figure(13, 4.2 * len(precisions) + 0.6)
    panels = figure.subplots(len(precisions), 2, squeeze=False)
    for (kept, step), precision in zip(panels, precisions, strict=True):
        same = [row for row in rows if row["precision"] == precision]
        _draw_bars(kept, same, "kept", f"{precision}, between steps")
        _draw_bars(step, same, "step", f"{precision}, at the fullest moment of a step")
    marks: list[Artist] = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    marks.append(Patch(facecolor="white", edgecolor=INK, label="plan or tensors, together"))
    add_legend(figure, [*marks, *panels[0, 0].get_legend_handles_labels()[0]])
    return figure


def _draw_bars(axes: Axes, rows: Sequence[Row], moment: str, title: str) -> None:
    # By kind are the tensors between steps, on the right, and the plan of a step, on the left.
    suffix, by_kind = ("", 0.2) if moment == "kept" else ("_planned", -0.2)
    for place, row in enumerate(rows):
        bottom = 0.0
        for kind, colour in KINDS.items():
            height = row.get(f"{moment}_{kind}{suffix}", 0) / MIB
            axes.bar(place + by_kind, height, 0.38, bottom, color=colour)
            bottom += height
        height = totals(row, moment)[0 if moment == "kept" else 1] / MIB
        axes.bar(place - by_kind, height, 0.38, facecolor="white", edgecolor=INK, linewidth=1)
    process = [row[f"{moment}_process"] / MIB for row in rows]
    places = [place + 0.2 for place in range(len(rows))]
    axes.plot(places, process, "_", color=INK, markersize=16, label="process")
    dress(axes, title, ylabel="MiB")
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(rows)), [layout_name(row).replace(", ", "\n") for row in rows])


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"

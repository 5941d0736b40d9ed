"""What a run of bench_memory.py has found: tables, a picture and a verdict."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["TOLERANCE", "MemoryReport", "MemoryRow"]

#: Of tensors between steps, relative to the plan.
TOLERANCE = 0.03
MIB = 2**20
KINDS = {
    "weights": "#2563a8",
    "optimizer": "#58b0e3",
    "gradients": "#d97706",
    "buckets": "#9ca3af",
    "activations": "#5aa469",
}
_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
NOTES = """\
- Tensors between steps: bytes of the storages of live tensors that Python knows of, each once.
- Tensors in a step: the most that torch's allocator has given out at any time, activations, gloo's
  copies and what operators need inside included.
- Process: private memory between steps, and the growth of the peak resident set in a step, from
  before the model was built. It has the interpreter's own memory, the allocator's record and what
  is kept for reuse as well; buckets that are allocated and never filled are not resident.
- The plan is that of ds_linclip/planner/plan.py, which a run logs at its start, TensorBoard shows
  and a dry run prints."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One rank of one layout; everything in bytes.

    Attributes:
        kept_*: Between steps.
        step*: At the fullest moment of a step.
        *_planned: As planned.
        *_process: Of the process; otherwise of tensors.
    """

    ranks: int
    precision: str
    stage: int
    micro_batches: int
    rank: int
    num_parameters: int
    kept_planned: int
    kept_weights: int
    kept_gradients: int
    kept_optimizer: int
    kept_buckets: int
    kept_other: int
    kept_process: int
    step_weights_planned: int
    step_gradients_planned: int
    step_optimizer_planned: int
    step_buckets_planned: int
    step_activations_planned: int
    step: int
    step_process: int

    @property
    def kept(self) -> int:
        kinds = (getattr(self, f"kept_{kind}", 0) for kind in KINDS)
        return self.kept_other + sum(kinds)

    @property
    def step_planned(self) -> int:
        return sum(getattr(self, f"step_{kind}_planned") for kind in KINDS)


class MemoryReport:
    """The rows of one run, with what was measured where."""

    def __init__(self, facts: dict[str, str], rows: Sequence[MemoryRow]) -> None:
        self.facts, self.rows = facts, rows
        #: Per layout the rank that has most in a step.
        self.fullest: list[MemoryRow] = []
        layouts: dict[tuple[Any, ...], list[MemoryRow]] = {}
        for row in rows:
            key = row.precision, row.micro_batches, row.ranks, row.stage
            layouts.setdefault(key, []).append(row)
        for same in layouts.values():
            self.fullest.append(max(same, key=lambda row: row.step))

    @property
    def passed(self) -> bool:
        return all(abs(row.kept / row.kept_planned - 1) <= TOLERANCE for row in self.rows)

    def write(self, folder: Path) -> None:
        """Write memory.csv, summary.md and memory.png."""
        with (folder / "memory.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(MemoryRow))
            writer.writerows(asdict(row).values() for row in self.rows)
        (folder / "summary.md").write_text(self.summary())
        self.draw().savefig(folder / "memory.png", dpi=150)

    def summary(self) -> str:
        """All but the picture, in Markdown."""
        size = max(row.num_parameters for row in self.rows)
        sections = [
            f"# Memory of a rank, {size / 1e6:.1f} M parameters",
            "\n".join(f"- {name}: {value}" for name, value in self.facts.items()),
            "MiB of the rank that has most in a step.",
            "## Between steps",
            _table(
                ["plan", "tensors", "tensors / plan", "process"],
                {
                    _name(row): [
                        *(_mib(row.kept_planned), _mib(row.kept)),
                        *(f"{row.kept / row.kept_planned:.3f}", _mib(row.kept_process)),
                    ]
                    for row in self.fullest
                },
            ),
            "## At the fullest moment of a step",
            "By kind: the plan.",
            _table(
                ["plan", "tensors", "tensors / plan", "process", *KINDS],
                {
                    _name(row): [
                        *(_mib(row.step_planned), _mib(row.step)),
                        *(f"{row.step / row.step_planned:.2f}", _mib(row.step_process)),
                        *(_mib(getattr(row, f"step_{kind}_planned")) for kind in KINDS),
                    ]
                    for row in self.fullest
                },
            ),
            "## How to read this",
            NOTES,
        ]
        return "\n\n".join(sections) + "\n"

    def draw(self) -> Figure:
        """Plan on the left of tensors, one of them stacked by kind; the process as a mark."""
        precisions = list(dict.fromkeys(row.precision for row in self.fullest))
        figure = Figure(figsize=(13, 4.2 * len(precisions) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(precisions), 2, squeeze=False)
        for (kept, step), precision in zip(panels, precisions, strict=True):
            rows = [row for row in self.fullest if row.precision == precision]
            for axes, moment in ((kept, "kept"), (step, "step")):
                _bars(axes, rows, moment)
                where = "between steps" if moment == "kept" else "at the fullest moment of a step"
                axes.set_title(
                    f"{precision}, {where}", loc="left", fontsize=11, color=_INK, weight="bold"
                )
        marks: list[Any] = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
        marks.append(Patch(facecolor="white", edgecolor=_INK, label="plan or tensors, together"))
        marks += panels[0, 0].get_legend_handles_labels()[0]
        figure.legend(handles=marks, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
        size = max(row.num_parameters for row in self.rows)
        figure.suptitle(
            f"Memory of a rank, {size / 1e6:.1f} M parameters: {self.facts['device']}, deepspeed "
            f"{self.facts['deepspeed']}, {self.facts['date_utc']} UTC, {self.facts['commit']}",
            x=0.01,
            ha="left",
            fontsize=11,
            color=_MUTED,
        )
        return figure


def _bars(axes: Axes, rows: Sequence[MemoryRow], moment: str) -> None:
    # By kind are the tensors between steps, on the right, and the plan of a step, on the left.
    by_kind, total = (0.2, -0.2) if moment == "kept" else (-0.2, 0.2)
    suffix, other = ("", "_planned") if moment == "kept" else ("_planned", "")
    for place, row in enumerate(rows):
        bottom = 0.0
        for kind, colour in KINDS.items():
            height = getattr(row, f"{moment}_{kind}{suffix}", 0) / MIB
            axes.bar(place + by_kind, height, 0.38, bottom, color=colour)
            bottom += height
        height = getattr(row, f"{moment}{other}") / MIB
        axes.bar(place + total, height, 0.38, facecolor="white", edgecolor=_INK, linewidth=1)
    process = [getattr(row, f"{moment}_process") / MIB for row in rows]
    places = [place + 0.2 for place in range(len(rows))]
    axes.plot(places, process, "_", color=_INK, markersize=16, label="process")
    axes.set_xticks(range(len(rows)), [_name(row, short=True) for row in rows])
    axes.set_ylabel("MiB", fontsize=9, color=_MUTED)
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _name(row: MemoryRow, *, short: bool = False) -> str:
    ranks = f"{row.ranks} rank{'s' if row.ranks > 1 else ''}"
    micro = f", {row.micro_batches} micro-batches" if row.micro_batches > 1 else ""
    if short:
        return f"ZeRO-{row.stage}\n{ranks}{micro.replace(', ', chr(10))}"
    return f"{row.precision}, {ranks}, ZeRO-{row.stage}{micro}"


def _table(header: Sequence[str], lines: dict[str, list[str]]) -> str:
    rule = "|:---|" + "---:|" * len(header)
    body = [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]
    return "\n".join([f"| layout | {' | '.join(header)} |", rule, *body])


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"

"""Report of bench_memory.py: tables, a picture and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

__all__ = ["MemoryRow", "is_as_planned", "write_memory_report"]

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
  and a dry run prints."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One rank of one layout; everything in bytes.

    Attributes:
        kept_*: Memory between steps.
        step*: Memory at the fullest moment of a step.
        *_planned: What the planner predicts.
        *_process: Memory of the whole process; the others are those of tensors.
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
    def layout(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        micro = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{self.precision}, {ranks}, ZeRO-{self.stage}{micro}"

    @property
    def kept(self) -> int:
        kinds = (getattr(self, f"kept_{kind}", 0) for kind in KINDS)
        return self.kept_other + sum(kinds)

    @property
    def step_planned(self) -> int:
        return sum(getattr(self, f"step_{kind}_planned") for kind in KINDS)


def is_as_planned(rows: Sequence[MemoryRow]) -> bool:
    """Return whether the tensors between steps are those of the plan, on every rank."""
    return all(abs(row.kept / row.kept_planned - 1) <= TOLERANCE for row in rows)


def write_memory_report(folder: Path, facts: dict[str, str], rows: Sequence[MemoryRow]) -> str:
    """Write memory.csv, memory.png and summary.md, whose text is returned.

    Args:
        folder: Created where it is missing.
        facts: Conditions of the run; see :func:`linclip_eval.results.write_report`.
        rows: One for every rank of every layout.
    """
    by_layout: dict[str, MemoryRow] = {}
    for row in rows:
        other = by_layout.setdefault(row.layout, row)
        by_layout[row.layout] = row if row.step > other.step else other
    fullest = list(by_layout.values())
    between, within = [], []
    for row in fullest:
        share = f"{row.kept / row.kept_planned:.3f}"
        sizes = _mib(row.kept_planned), _mib(row.kept), share, _mib(row.kept_process)
        between.append([row.layout, *sizes])
        share = f"{row.step / row.step_planned:.2f}"
        sizes = _mib(row.step_planned), _mib(row.step), share, _mib(row.step_process)
        kinds = (_mib(getattr(row, f"step_{kind}_planned")) for kind in KINDS)
        within.append([row.layout, *sizes, *kinds])
    header = ["layout", "plan", "tensors", "tensors / plan", "process"]
    size = max(row.num_parameters for row in rows)
    return write_report(
        folder,
        title=f"Memory of a rank, {size / 1e6:.1f} M parameters",
        sections=[
            "MiB of the rank that has most in a step.",
            "![Memory of a rank in every layout](memory.png)",
            "## Between steps",
            markdown_table(header, between),
            "## At the fullest moment of a step",
            "By kind: the plan.",
            markdown_table([*header, *KINDS], within),
            "## How to read this",
            NOTES,
        ],
        facts=facts,
        tables={"memory.csv": rows},
        figures={"memory.png": _draw(fullest)},
    )


def _draw(rows: Sequence[MemoryRow]) -> Figure:
    """Draw the plan left of the tensors, one of them by kind; the process as a mark."""
    precisions = list(dict.fromkeys(row.precision for row in rows))
    figure = new_figure(13, 4.2 * len(precisions) + 0.6)
    panels = figure.subplots(len(precisions), 2, squeeze=False)
    for (kept, step), precision in zip(panels, precisions, strict=True):
        same = [row for row in rows if row.precision == precision]
        _draw_bars(kept, same, "kept", f"{precision}, between steps")
        _draw_bars(step, same, "step", f"{precision}, at the fullest moment of a step")
    marks: list[Artist] = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    marks.append(Patch(facecolor="white", edgecolor=INK, label="plan or tensors, together"))
    add_legend(figure, [*marks, *panels[0, 0].get_legend_handles_labels()[0]])
    return figure


def _draw_bars(axes: Axes, rows: Sequence[MemoryRow], moment: str, title: str) -> None:
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
        axes.bar(place + total, height, 0.38, facecolor="white", edgecolor=INK, linewidth=1)
    process = [getattr(row, f"{moment}_process") / MIB for row in rows]
    places = [place + 0.2 for place in range(len(rows))]
    axes.plot(places, process, "_", color=INK, markersize=16, label="process")
    dress(axes, title, ylabel="MiB")
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(rows)), [row.layout.replace(", ", "\n") for row in rows])


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"

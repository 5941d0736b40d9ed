"""What a run of bench_data.py has found: ratios, requirements, tables and a picture."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.data.loaders import Settings, Throughput

__all__ = ["FIGURES", "LOADERS", "Report", "Requirement", "Row", "Spread"]

#: Of a :class:`Row`, and what they are called.
FIGURES = {
    "samples_per_second": "samples / s",
    "samples_per_cpu_second": "samples / CPU-second",
}
#: ``Settings.loader`` -> what it is called, and its colour.
LOADERS = {
    "ds_linclip": ("ds_linclip", "#2563a8"),
    "open_clip": ("open_clip_train", "#d97706"),
}
_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        case: What was read.
        bytes_per_image: Mean size of the files.
    """

    case: str
    repetition: int
    settings: Settings
    throughput: Throughput
    bytes_per_image: float

    @property
    def samples_per_second(self) -> float:
        return self.throughput.samples / self.throughput.wall_seconds

    @property
    def samples_per_cpu_second(self) -> float:
        return self.throughput.samples / self.throughput.cpu_seconds

    def record(self) -> dict[str, object]:
        values = asdict(self.settings) | asdict(self.throughput)
        values |= {figure: round(getattr(self, figure), 1) for figure in FIGURES}
        values["skipped"] = sum(self.throughput.skipped.values())
        del values["shards"]
        return {
            "case": self.case,
            "repetition": self.repetition,
            "bytes_per_image": round(self.bytes_per_image),
            **{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()},
        }


class Spread(NamedTuple):
    """A figure over the repetitions."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Requirement:
    """What was asked for, and what was found."""

    name: str
    rule: str
    found: str
    passed: bool


class Report:
    """The rows of one run, with what was measured where.

    Args:
        facts: By name, in the order of the summary.
        rows: All measurements.
        requirements: What the run is judged by.
        notes: How it was measured, in Markdown.
    """

    def __init__(
        self,
        facts: dict[str, str],
        rows: Sequence[Row],
        requirements: Sequence[Requirement],
        notes: str,
    ) -> None:
        self.facts, self.rows, self.notes = facts, rows, notes
        self.requirements = requirements
        self.cases = list(dict.fromkeys(row.case for row in rows))

    def write(self, folder: Path) -> None:
        """Write data.csv, summary.md and data.png."""
        common = {name: self.facts[name] for name in ("device", "torch", "date_utc", "commit")}
        records = [row.record() | common for row in self.rows]
        with (folder / "data.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        (folder / "summary.md").write_text(self.summary())
        self.draw().savefig(folder / "data.png", dpi=150)

    def summary(self) -> str:
        """All but the picture, in Markdown aligned so that it can be read as it is."""
        verdicts = [
            [one.name, one.rule, one.found, "pass" if one.passed else "FAIL"]
            for one in self.requirements
        ]
        sections = [
            f"# Training data on {self.facts['device']}",
            _table(["", ""], [[*fact] for fact in self.facts.items()], left=2),
            "## Requirements",
            _table(["", "required", "found", ""], verdicts, left=4),
            "## Throughput",
            "Median and range over the repetitions.",
            _table(["", "loader", *FIGURES.values()], self._throughput(), left=2),
            "## ds_linclip over open_clip_train",
            "Ratio of the medians, and the range of the repetitions' own ratios.",
            _table(["", *FIGURES.values()], self._ratios()),
            "## How it was measured",
            self.notes,
        ]
        return "\n\n".join(sections) + "\n"

    def draw(self) -> Figure:
        """Median and range of both figures, a line per case and loader."""
        lines = [(case, loader) for case in self.cases for loader in self._loaders(case)]
        figure = Figure(figsize=(12, 1.7 + 0.42 * len(lines)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(FIGURES), sharey=True)
        for axes, (name, title) in zip(panels, FIGURES.items(), strict=True):
            axes.set_title(title, loc="left", fontsize=11, color=_INK, weight="bold")
            self._draw_figure(axes, name)
        panels[0].invert_yaxis()
        handles = [
            panels[0].scatter([], [], color=colour, s=36, label=label)
            for loader, (label, colour) in LOADERS.items()
            if any(loader in line for line in lines)
        ]
        figure.legend(
            handles=handles,
            loc="outside lower right",
            ncols=2,
            frameon=False,
            fontsize=9,
            labelcolor=_INK,
        )
        facts = self.facts
        figure.suptitle(
            f"Training data, {facts['workers']} worker(s): {facts['device']}, torch "
            f"{facts['torch']}, {facts['date_utc']} UTC, {facts['commit']}",
            x=0.01,
            ha="left",
            fontsize=10,
            color=_MUTED,
        )
        return figure

    def spread(self, case: str, loader: str, figure: str) -> Spread:
        """Median and range of one figure over the repetitions."""
        return _spread(list(self._values(case, loader, figure).values()))

    def ratio(self, figure: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Spread:
        """Ratio of one figure's medians, and the range of its ratio in the same repetition.

        Args:
            figure: One of :data:`FIGURES`.
            ours, theirs: Case and loader.
        """
        a, b = self._values(*ours, figure), self._values(*theirs, figure)
        pairs = [a[repetition] / b[repetition] for repetition in a.keys() & b.keys()]
        return Spread(median(a.values()) / median(b.values()), min(pairs), max(pairs))

    def _draw_figure(self, axes: Axes, figure: str) -> None:
        places, labels, place = [], [], 0.0
        for case in self.cases:
            loaders = self._loaders(case)
            places.append(place + (len(loaders) - 1) / 2)
            labels.append(case.replace(", ", "\n"))
            for loader in loaders:
                middle, low, high = self.spread(case, loader, figure)
                colour = LOADERS[loader][1]
                axes.barh(place, middle, height=0.72, color=colour, alpha=0.16)
                axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
                axes.scatter(middle, place, color=colour, s=36, zorder=3)
                text = f"{middle:.0f}"
                if loader == "ds_linclip" and len(loaders) > 1:
                    ratio = self.ratio(figure, (case, loader), (case, "open_clip"))
                    text += f"   {ratio.middle:.2f}x ({ratio.low:.2f} - {ratio.high:.2f})"
                style: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": _INK}
                axes.annotate(
                    text, (high, place), xytext=(8, 0), textcoords="offset points", **style
                )
                place += 1
            place += 0.5
        axes.set_yticks(places, labels, fontsize=9, color=_INK)
        axes.set_xlim(0, 1.45 * axes.dataLim.x1)
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelsize=8.5, labelcolor=_MUTED)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def _values(self, case: str, loader: str, figure: str) -> dict[int, float]:
        return {
            row.repetition: getattr(row, figure)
            for row in self.rows
            if (row.case, row.settings.loader) == (case, loader)
        }

    def _loaders(self, case: str) -> list[str]:
        return list(dict.fromkeys(row.settings.loader for row in self.rows if row.case == case))

    def _throughput(self) -> list[list[str]]:
        lines = []
        for case in self.cases:
            for loader in self._loaders(case):
                cells = []
                for figure in FIGURES:
                    middle, low, high = self.spread(case, loader, figure)
                    cells.append(f"{middle:.0f} ({low:.0f} ... {high:.0f})")
                lines.append([case, LOADERS[loader][0], *cells])
        return lines

    def _ratios(self) -> list[list[str]]:
        lines = []
        for case in self.cases:
            if "open_clip" in self._loaders(case):
                found = [
                    self.ratio(figure, (case, "ds_linclip"), (case, "open_clip"))
                    for figure in FIGURES
                ]
                cells = (f"{r.middle:.2f}x ({r.low:.2f} ... {r.high:.2f})" for r in found)
                lines.append([case, *cells])
        return lines


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; this many columns are aligned to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    aligned = [
        [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (header, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:]))

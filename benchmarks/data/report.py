"""Report of bench_data.py: ratios, tables and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from linclip_eval.plotting import INK, LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report

__all__ = ["RATES", "DataReport", "Requirement", "Spread"]

#: Rates of a row, and their titles.
RATES = {"samples_per_second": "samples / s", "samples_per_cpu_second": "samples / CPU-second"}
#: Loader -> the name of its project, and its colour.
LOADERS = {"ds_linclip": ("ds_linclip", LINEAR), "open_clip": ("open_clip_train", SOFTMAX)}


class Spread(NamedTuple):
    """Median and range of a rate over the repetitions."""

    middle: float
    low: float
    high: float


class Requirement(NamedTuple):
    """A rule that a run has to meet, and what was found."""

    name: str
    rule: str
    found: str
    passed: bool


class DataReport:
    """Rows of one run.

    Args:
        rows: All measurements: "case", "repetition", "bytes_per_image", and the arguments and
            results of ``loaders.measure``.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        #: Case and loader of everything that was measured, cases in their order.
        self.lines = [
            (case, loader)
            for case in dict.fromkeys(row["case"] for row in rows)
            for loader in dict.fromkeys(row["loader"] for row in rows if row["case"] == case)
        ]

    def write(
        self, folder: Path, facts: dict[str, str], requirements: Sequence[Requirement], notes: str
    ) -> str:
        """Write data.csv, data.png and summary.md, whose text is returned.

        Args:
            folder: Created where it is missing.
            facts: Conditions of the run; see :func:`linclip_eval.results.write_report`.
            requirements: Verdicts on the run.
            notes: How it was measured, in Markdown.
        """
        verdicts = [[*rule, "pass" if passed else "FAIL"] for *rule, passed in requirements]
        throughput, ratios = [], []
        for case, loader in self.lines:
            spreads = [self.spread(case, loader, rate) for rate in RATES]
            cells = [f"{s.middle:.0f} ({s.low:.0f} ... {s.high:.0f})" for s in spreads]
            throughput.append([case, LOADERS[loader][0], *cells])
            if loader == "open_clip":
                found = [self.over_open_clip(case, rate) for rate in RATES]
                ratios.append(
                    [case, *(f"{s.middle:.2f}x ({s.low:.2f} ... {s.high:.2f})" for s in found)]
                )
        return write_report(
            folder,
            title="Training data",
            sections=[
                "![Throughput of both loaders](data.png)",
                "## Requirements",
                markdown_table(["", "required", "found", ""], verdicts, align="llll"),
                "## Throughput",
                "Median and range over the repetitions.",
                markdown_table(["", "loader", *RATES.values()], throughput, align="llrr"),
                "## ds_linclip over open_clip_train",
                "Ratio of the medians, and the range of the repetitions' own ratios.",
                markdown_table(["", *RATES.values()], ratios),
                "## How it was measured",
                notes,
            ],
            facts=facts,
            tables={"data.csv": self.rows},
            table_facts=("device", "torch", "date_utc", "commit"),
            figures={"data.png": self._draw()},
        )

    def spread(self, case: str, loader: str, rate: str) -> Spread:
        """Return median and range of one rate over the repetitions."""
        values = self._values(case, loader, rate).values()
        return Spread(median(values), min(values), max(values))

    def ratio(self, rate: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Spread:
        """Return the ratio of one rate's medians, and the range of its ratio in one repetition.

        ``ours`` and ``theirs`` are case and loader.
        """
        a, b = self._values(*ours, rate), self._values(*theirs, rate)
        pairs = [a[repetition] / b[repetition] for repetition in a.keys() & b.keys()]
        return Spread(median(a.values()) / median(b.values()), min(pairs), max(pairs))

    def over_open_clip(self, case: str, rate: str) -> Spread:
        """Return :meth:`ratio` of both loaders in one case."""
        return self.ratio(rate, (case, "ds_linclip"), (case, "open_clip"))

    def _values(self, case: str, loader: str, rate: str) -> dict[int, float]:
        rows = (row for row in self.rows if (row["case"], row["loader"]) == (case, loader))
        return {row["repetition"]: row[rate] for row in rows}

    def _draw(self) -> Figure:
        """Draw median and range of both rates, a line per case and loader."""
        figure = new_figure(12, 1.7 + 0.42 * len(self.lines))
        panels = figure.subplots(1, len(RATES), sharey=True)
        for axes, (rate, title) in zip(panels, RATES.items(), strict=True):
            for place, (case, loader) in enumerate(self.lines):
                middle, low, high = self.spread(case, loader, rate)
                colour = LOADERS[loader][1]
                axes.barh(place, middle, height=0.72, color=colour, alpha=0.16)
                axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
                axes.scatter(middle, place, color=colour, s=36, zorder=3)
                text = f"   {middle:.0f}"
                if loader == "ds_linclip" and (case, "open_clip") in self.lines:
                    ratio = self.over_open_clip(case, rate)
                    text += f"   {ratio.middle:.2f}x ({ratio.low:.2f} - {ratio.high:.2f})"
                axes.text(high, place, text, va="center", fontsize=8.5, color=INK)
            axes.set_xlim(0, 1.45 * axes.dataLim.x1)
            dress(axes, title)
            axes.grid(visible=False, axis="y")
            labels = [case.replace(", ", "\n") for case, _ in self.lines]
            axes.set_yticks(range(len(labels)), labels)
        panels[0].invert_yaxis()
        measured = dict.fromkeys(loader for _, loader in self.lines)
        styles = (LOADERS[loader] for loader in measured)
        marks = [Line2D([], [], ls="", marker="o", color=c, label=name) for name, c in styles]
        add_legend(figure, marks)
        return figure

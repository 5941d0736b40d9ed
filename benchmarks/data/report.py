"""Report of bench_data.py: ratios, requirements, tables and a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.data.loaders import Settings, Throughput
from linclip_eval.plotting import INK, LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report

__all__ = ["LOADERS", "RATES", "DataReport", "DataRow", "Requirement", "Spread"]

#: Rates of a :class:`DataRow`, and their titles.
RATES = {
    "samples_per_second": "samples / s",
    "samples_per_cpu_second": "samples / CPU-second",
}
#: ``Settings.loader`` -> the name of its project, and its colour.
LOADERS = {"ds_linclip": ("ds_linclip", LINEAR), "open_clip": ("open_clip_train", SOFTMAX)}


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One measurement.

    Attributes:
        case: The shards and the size of the output.
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
        """Return the row of data.csv."""
        values = asdict(self.settings) | asdict(self.throughput)
        del values["shards"]
        return {
            "case": self.case,
            "repetition": self.repetition,
            "bytes_per_image": round(self.bytes_per_image),
            **values,
            "skipped": sum(self.throughput.skipped.values()),
            **{rate: round(getattr(self, rate), 1) for rate in RATES},
        }


class Spread(NamedTuple):
    """Median and range of a rate over the repetitions."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Requirement:
    """A rule that a run has to meet, and what was found."""

    name: str
    rule: str
    found: str
    passed: bool


class DataReport:
    """Rows of one run.

    Args:
        rows: All measurements.
    """

    def __init__(self, rows: Sequence[DataRow]) -> None:
        self.rows = rows
        #: Cases, and the loaders that were measured with each.
        self.loaders: dict[str, list[str]] = {}
        for row in rows:
            loaders = self.loaders.setdefault(row.case, [])
            if row.settings.loader not in loaders:
                loaders.append(row.settings.loader)

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
        verdicts = [
            [one.name, one.rule, one.found, "pass" if one.passed else "FAIL"]
            for one in requirements
        ]
        return write_report(
            folder,
            title="Training data",
            sections=[
                "![Throughput of both loaders](data.png)",
                "## Requirements",
                markdown_table(["", "required", "found", ""], verdicts, align="llll"),
                "## Throughput",
                "Median and range over the repetitions.",
                markdown_table(
                    ["", "loader", *RATES.values()], list(self._throughput()), align="llrr"
                ),
                "## ds_linclip over open_clip_train",
                "Ratio of the medians, and the range of the repetitions' own ratios.",
                markdown_table(["", *RATES.values()], list(self._ratios())),
                "## How it was measured",
                notes,
            ],
            facts=facts,
            tables={"data.csv": [row.record() for row in self.rows]},
            table_facts=("device", "torch", "date_utc", "commit"),
            figures={"data.png": self._draw()},
        )

    def spread(self, case: str, loader: str, rate: str) -> Spread:
        """Return median and range of one rate over the repetitions."""
        values = self._values(case, loader, rate).values()
        return Spread(median(values), min(values), max(values))

    def ratio(self, rate: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Spread:
        """Return the ratio of one rate's medians, and the range of its ratio in one repetition.

        Args:
            rate: One of :data:`RATES`.
            ours, theirs: Case and loader.
        """
        a, b = self._values(*ours, rate), self._values(*theirs, rate)
        pairs = [a[repetition] / b[repetition] for repetition in a.keys() & b.keys()]
        return Spread(median(a.values()) / median(b.values()), min(pairs), max(pairs))

    def _draw(self) -> Figure:
        """Draw median and range of both rates, a line per case and loader."""
        num_lines = sum(map(len, self.loaders.values()))
        figure = new_figure(12, 1.7 + 0.42 * num_lines)
        panels = figure.subplots(1, len(RATES), sharey=True)
        for axes, (rate, title) in zip(panels, RATES.items(), strict=True):
            self._draw_rate(axes, rate, title)
        panels[0].invert_yaxis()
        measured = {row.settings.loader for row in self.rows}
        styles = [style for loader, style in LOADERS.items() if loader in measured]
        marks = [Line2D([], [], ls="", marker="o", color=c, label=label) for label, c in styles]
        add_legend(figure, marks)
        return figure

    def _draw_rate(self, axes: Axes, rate: str, title: str) -> None:
        places, place = {}, 0.0
        for case, loaders in self.loaders.items():
            places[case] = place + (len(loaders) - 1) / 2
            for loader in loaders:
                middle, low, high = self.spread(case, loader, rate)
                colour = LOADERS[loader][1]
                axes.barh(place, middle, height=0.72, color=colour, alpha=0.16)
                axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
                axes.scatter(middle, place, color=colour, s=36, zorder=3)
                text = f"{middle:.0f}"
                if loader == "ds_linclip" and len(loaders) > 1:
                    ratio = self.ratio(rate, (case, loader), (case, "open_clip"))
                    text += f"   {ratio.middle:.2f}x ({ratio.low:.2f} - {ratio.high:.2f})"
                axes.annotate(
                    text,
                    (high, place),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color=INK,
                )
                place += 1
            place += 0.5
        axes.set_xlim(0, 1.45 * axes.dataLim.x1)
        dress(axes, title)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(list(places.values()), [case.replace(", ", "\n") for case in places])

    def _values(self, case: str, loader: str, rate: str) -> dict[int, float]:
        return {
            row.repetition: getattr(row, rate)
            for row in self.rows
            if (row.case, row.settings.loader) == (case, loader)
        }

    def _throughput(self) -> Iterator[list[str]]:
        for case, loaders in self.loaders.items():
            for loader in loaders:
                spreads = [self.spread(case, loader, rate) for rate in RATES]
                cells = (f"{s.middle:.0f} ({s.low:.0f} ... {s.high:.0f})" for s in spreads)
                yield [case, LOADERS[loader][0], *cells]

    def _ratios(self) -> Iterator[list[str]]:
        for case, loaders in self.loaders.items():
            if "open_clip" in loaders:
                found = [self.ratio(r, (case, "ds_linclip"), (case, "open_clip")) for r in RATES]
                yield [case, *(f"{s.middle:.2f}x ({s.low:.2f} ... {s.high:.2f})" for s in found)]

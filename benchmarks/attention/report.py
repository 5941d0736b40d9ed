"""What a run of bench_attention.py has found: comparisons, tables and a picture."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, PercentFormatter

__all__ = [
    "LABEL",
    "MUTED",
    "TITLE",
    "WORKS",
    "Check",
    "Report",
    "Row",
    "crossover",
    "dress",
    "slope",
    "table",
]

WORKS = ("forward", "forward+backward")
#: Slopes are fitted from here on.
LONG = 1025

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
TITLE: dict[str, Any] = {"fontsize": 11, "color": INK, "weight": "bold"}
LABEL: dict[str, Any] = {"fontsize": 9, "color": MUTED}
#: Part of an implementation's name -> colour and marker; the first that fits.
_STYLES = {
    "quadratic": ("#7c5cc4", "P"),
    "plain": ("#64748b", "s"),
    "fla chunk": ("#2a9d6f", "s"),
    "SDPA flash": ("#d97706", "^"),
    "SDPA cuDNN": ("#b5408f", "v"),
    "Eq. 7": ("#2563a8", "o"),
    "Eq. 4": ("#58b0e3", "D"),
}
#: Whose crossover the picture shows.
_HEADLINE = {False: "linclip Eq. 7", True: "linclip Eq. 7, causal"}


@dataclass(frozen=True)
class Check:
    """Relative RMS of one tensor against the float64 definition, and what the rule allows."""

    form: str
    num_tokens: int
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not pass

    def __str__(self) -> str:
        place = f"{self.form}, N = {self.num_tokens}, {self.tensor}"
        return f"{place}: relative RMS {self.error:.2e}, allowed {self.allowed:.2e}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation at one length; without times where it was skipped."""

    implementation: str
    family: str  # "linclip", "sdpa" or "other"
    causal: bool
    work: str
    num_tokens: int
    batch: int
    num_heads: int
    head_dim: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    calls: int = 0
    us_per_head: float | None = None
    peak_mib: float | None = None  # beyond the inputs
    gb_per_s: float | None = None  # minimum traffic over time
    copy_share: float | None = None  # of the bandwidth of a copy
    skipped: str = ""


def slope(times: dict[int, float]) -> float:
    """Exponent of N in the time, fitted from 1025 tokens on; NaN with fewer than two lengths."""
    lengths = [n for n in times if n >= LONG]
    if len(lengths) < 2:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log([times[n] for n in lengths]), 1)[0])


def crossover(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Number of tokens from which ours is faster, interpolated in log-log.

    Returns:
        0 if ours is faster at all common lengths, infinity if not at the longest of them, NaN if
        there are none.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        return math.nan
    gains = [math.log(theirs[n] / ours[n]) for n in lengths]
    losing = [i for i, gain in enumerate(gains) if gain <= 0]
    if not losing:
        return 0.0
    last = losing[-1]
    if last == len(gains) - 1:
        return math.inf
    return math.exp(np.interp(0, gains[last : last + 2], np.log(lengths[last : last + 2])))


class Report:
    """The rows of one run, with what was measured where, and the checks it has passed."""

    def __init__(self, facts: dict[str, str], checks: Sequence[Check], rows: Sequence[Row]) -> None:
        self.facts, self.checks, self.rows = facts, checks, rows
        self.tokens = sorted({row.num_tokens for row in rows})

    def write(self, folder: Path) -> None:
        """Write results.csv, summary.md and figure.png."""
        named = ("device", "torch", "triton", "date_utc", "commit", "dtype")
        common = {name: self.facts[name] for name in named}
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *common])
            writer.writeheader()
            for row in self.rows:
                values = asdict(row).items()
                rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values}
                writer.writerow(rounded | common)
        (folder / "summary.md").write_text(self.summary())
        self.draw().savefig(folder / "figure.png", dpi=150)

    def summary(self) -> str:
        """All but the picture, in Markdown aligned so that it can be read as it is."""
        by_length = self._by_length
        peaks = []
        if any(row.peak_mib is not None for row in self.rows):
            by_form = by_length("peak_mib", lambda mib: f"{mib:.0f}")
            peaks = ["## Peak memory beyond the inputs, MiB", by_form]
        sections = [
            f"# Linear attention and SDPA on {self.facts['device']}",
            table(["", ""], [[*fact] for fact in self.facts.items()], left=2),
            "## Correctness",
            "Relative RMS against the float64 definition: the worst of all lengths, of output and "
            "gradients.",
            self._correctness(),
            "## Speed-up over the fastest SDPA",
            self._speed_ups(),
            "## Growth",
            f"Exponent of N in the time per head, from {LONG} tokens on, and the number of tokens "
            "from which\nthe form is faster than the fastest SDPA.",
            self._growth(),
            "## Time per head, us",
            by_length("us_per_head", lambda us: f"{us:.3g}" if us < 1000 else f"{us:.0f}"),
            "## Share of the copy bandwidth",
            "Minimum traffic (4 tensors forward, 11 forward and backward) over time.",
            by_length("copy_share", lambda share: f"{share:.1%}"),
            *peaks,
            "## Not measured",
            self._skipped(),
        ]
        return "\n\n".join(sections) + "\n"

    def draw(self) -> Figure:
        """Time per head and share of the copy bandwidth over N; causal forms in a second row."""
        figure = Figure(figsize=(15, 8.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        for causal, panels in zip((False, True), figure.subplots(2, 3, sharex=True), strict=True):
            kind = "causal" if causal else "bidirectional"
            for axes, work in zip(panels, WORKS, strict=False):
                self._draw_times(axes, causal, work)
                axes.set_title(f"{kind}, {work}", loc="left", **TITLE)
                axes.set_ylabel("time per head, µs", **LABEL)
            self._draw_shares(panels[2], causal)
            panels[2].set_title(f"{kind}, share of copy bandwidth", loc="left", **TITLE)
            panels[2].set_ylabel("minimum traffic / time / copy bandwidth", **LABEL)
            for axes in panels:
                dress(axes)
                axes.set_xlim(0.7 * self.tokens[0], 1.4 * self.tokens[-1])
        for axes in panels:
            axes.set_xlabel("tokens N", **LABEL)
        facts = self.facts
        figure.suptitle(
            f"Linear attention and SDPA: {facts['device']}, {facts['dtype']}, torch "
            f"{facts['torch']}, {facts['date_utc']} UTC, {facts['commit']}",
            x=0.01,
            ha="left",
            fontsize=11,
            color=MUTED,
        )
        return figure

    def _draw_times(self, axes: Axes, causal: bool, work: str) -> None:
        for name in self._names(causal=causal):
            times = self._times(name, work)
            if not times:
                continue
            growth = slope(times)
            label = _label(name) + (
                "" if math.isnan(growth) else f"  $\\propto N^{{{growth:.2f}}}$"
            )
            axes.plot(*_line(times), label=label, **_style(name))
        if axes.lines:
            axes.set_yscale("log")
            axes.set_ylim(top=50 * axes.get_ylim()[1])  # room for the legend
        ours = self._times(_HEADLINE[causal], work)
        place = crossover(ours, self._fastest_sdpa(causal=causal, work=work))
        if 0 < place < math.inf:
            lengths, heights = _line(ours)
            height = math.exp(np.interp(math.log(place), np.log(lengths), np.log(heights)))
            axes.scatter(
                place, height, s=110, facecolor="none", edgecolor=INK, linewidth=1.1, zorder=3
            )
            axes.text(
                0.98,
                0.03,
                f"Eq. 7 faster than SDPA from N = {place:.0f}",
                transform=axes.transAxes,
                ha="right",
                fontsize=8.5,
                color=INK,
            )
        if axes.lines:
            axes.legend(loc="upper left", frameon=False, fontsize=8.5, labelcolor=INK)

    def _draw_shares(self, axes: Axes, causal: bool) -> None:
        handles = []
        for name in self._names(causal=causal):
            if name in self._names(causal=causal, family="sdpa"):
                continue
            style = _style(name)
            for work, dashes in zip(WORKS, ("-", "--"), strict=True):
                shares = self._values(name, work, "copy_share")
                axes.plot(*_line(shares), **style | {"linestyle": dashes})
            handles.append(Line2D([], [], label=_label(name), **style))
        for work, dashes in zip(WORKS, ("-", "--"), strict=True):
            handles.append(Line2D([], [], linestyle=dashes, color=MUTED, label=work))
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(
            handles=handles, loc="upper left", frameon=False, fontsize=8.5, labelcolor=INK, ncols=2
        )

    def _values(self, name: str, work: str, field: str) -> dict[int, float]:
        """One figure of one implementation, by number of tokens where it was measured."""
        rows = (r for r in self.rows if (r.implementation, r.work) == (name, work))
        values = ((row.num_tokens, getattr(row, field)) for row in rows)
        return {num_tokens: value for num_tokens, value in values if value is not None}

    def _times(self, name: str, work: str) -> dict[int, float]:
        return self._values(name, work, "us_per_head")

    def _names(self, *, causal: bool | None = None, family: str | None = None) -> list[str]:
        found = (
            row.implementation
            for row in self.rows
            if causal in (None, row.causal) and family in (None, row.family)
        )
        return list(dict.fromkeys(found))

    def _fastest_sdpa(self, *, causal: bool, work: str) -> dict[int, float]:
        best: dict[int, float] = {}
        for name in self._names(causal=causal, family="sdpa"):
            for num_tokens, time in self._times(name, work).items():
                best[num_tokens] = min(time, best.get(num_tokens, math.inf))
        return best

    def _correctness(self) -> str:
        lines = []
        for form in dict.fromkeys(check.form for check in self.checks):
            checks = [check for check in self.checks if check.form == form]
            worst = max(checks, key=lambda check: check.error / check.allowed)
            lengths = ", ".join(map(str, dict.fromkeys(check.num_tokens for check in checks)))
            place = f"{worst.tensor}, N = {worst.num_tokens}"
            verdict = "pass" if all(check.passed for check in checks) else "FAIL"
            error, allowed = f"{worst.error:.1e}", f"{worst.allowed:.1e}"
            lines.append([form, lengths, error, allowed, place, verdict])
        return table(["form", "N", "error", "allowed", "where", ""], lines, left=6)

    def _speed_ups(self) -> str:
        lines = []
        for work in WORKS:
            for causal in (False, True):
                theirs = self._fastest_sdpa(causal=causal, work=work)
                for name in self._names(causal=causal, family="linclip"):
                    ours = self._times(name, work)
                    both = ours.keys() & theirs.keys()
                    cells = [
                        f"{theirs[n] / ours[n]:.3g}x" if n in both else "-" for n in self.tokens
                    ]
                    lines.append([f"{name}, {work}", *cells])
        return table(["N", *map(str, self.tokens)], lines)

    def _growth(self) -> str:
        lines = []
        for name in self._names():
            cells = [name]
            for work in WORKS:
                growth = slope(self._times(name, work))
                cells.append("-" if math.isnan(growth) else f"{growth:.2f}")
            for work in WORKS:
                cells.append(self._crossover(name, work))
            lines.append(cells)
        header = ["", *(f"exponent, {work}" for work in WORKS), *(f"N, {work}" for work in WORKS)]
        return table(header, lines)

    def _crossover(self, name: str, work: str) -> str:
        if name not in self._names(family="linclip"):
            return ""
        causal = name in self._names(causal=True)
        times, theirs = self._times(name, work), self._fastest_sdpa(causal=causal, work=work)
        place = crossover(times, theirs)
        if math.isnan(place):
            return "-"
        common = times.keys() & theirs.keys()
        if place == 0:
            return f"below {min(common)}"
        return f"above {max(common)}" if place == math.inf else f"{place:.0f}"

    def _by_length(self, field: str, form: Callable[[float], str]) -> str:
        lines = []
        for work in WORKS:
            for name in self._names():
                values = self._values(name, work, field)
                cells = (form(values[n]) if n in values else "-" for n in self.tokens)
                lines.append([f"{name}, {work}", *cells])
        return table(["N", *map(str, self.tokens)], lines)

    def _skipped(self) -> str:
        lines = [
            [row.implementation, row.work, str(row.num_tokens), row.skipped]
            for row in self.rows
            if row.skipped
        ]
        return table(["", "", "N", "why"], lines, left=4) if lines else "Nothing was left out."


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; this many columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (header, rule, *lines)))


def _line(values: dict[int, float]) -> tuple[list[int], list[float]]:
    return sorted(values), [values[n] for n in sorted(values)]


def _label(name: str) -> str:
    return name.removesuffix(", causal")


def _style(name: str) -> dict[str, Any]:
    colour, marker = next(style for part, style in _STYLES.items() if part in name)
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6}


def dress(axes: Axes) -> None:
    """The look of all panels; tokens on the horizontal axis."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(axis="both", which="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)

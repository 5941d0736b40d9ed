"""The figure of an inspection: captions, image sizes, file sizes and defects, one panel each.

It is a bare ``matplotlib.figure.Figure``: no window system, no global pyplot state.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = ["draw_inspection"]

_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_BLUE, _ORANGE, _GREEN, _RED = "#2563a8", "#d97706", "#2a9d6f", "#d1495b"
_MAX_CAUSES = 14


def draw_inspection(report: Mapping[str, Any]) -> Figure:
    """Draw the report of :func:`~ds_linclip.data.prepare.inspect_shards.inspect_shards`."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(11, 7.4), dpi=120, layout=layout)
    samples = report["samples"]
    figure.suptitle(
        f"{report['shards']['inspected']:,} shards: {samples['expected']:,} samples expected, "
        f"{samples['read']:,} read, {samples['usable']:,} usable",
        color=_INK,
        fontsize=13,
        fontweight="bold",
    )
    grid = figure.subplots(2, 2)
    _draw_captions(grid[0, 0], report["caption_tokens"])
    _draw_sizes(grid[0, 1], report["image_width"], report["image_height"])
    _draw_bytes(grid[1, 0], report["image_bytes"])
    _draw_causes(grid[1, 1], report["causes"])
    return figure


def _draw_captions(axes: Axes, tokens: Mapping[str, Any]) -> None:
    _style(axes, "Caption length", "tokens, start and end included")
    _fill(axes, tokens, _BLUE)
    limit = tokens["context_length"]
    if tokens["count"] and tokens["max"] > limit // 2:
        text = f"{limit} tokens\n {tokens['truncated_share']:.1%} longer"
        _mark(axes, limit + 0.5, text, _RED)
        axes.set_xlim(right=max(tokens["edges"][-1], 1.35 * limit))


def _draw_sizes(axes: Axes, width: Mapping[str, Any], height: Mapping[str, Any]) -> None:
    _style(axes, "Image size", "pixels")
    _fill(axes, width, _BLUE, label="width")
    if height["count"]:
        axes.stairs(height["counts"], height["edges"], color=_ORANGE, linewidth=1.6, label="height")
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9, ncols=2, loc="upper right")
    _log_ticks(axes, str)


def _draw_bytes(axes: Axes, size: Mapping[str, Any]) -> None:
    _style(axes, "Image file", "bytes")
    _fill(axes, size, _GREEN)
    if size["count"]:
        _mark(axes, size["median"], f"median {_bytes(size['median'])}", _INK)
    _log_ticks(axes, _bytes)


def _draw_causes(axes: Axes, causes: Mapping[str, Mapping[str, int]]) -> None:
    _style(axes, "Defects", "samples (shards)")
    shown = sorted(causes.items(), key=lambda item: item[1]["samples"])[-_MAX_CAUSES:]
    if not shown:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=_MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    counts = [count["samples"] for _, count in shown]
    bars = axes.barh([name for name, _ in shown], counts, height=0.66, color=_RED)
    labels = [f"{count['samples']:,} ({count['shards']:,})" for _, count in shown]
    axes.bar_label(bars, labels, padding=4, color=_INK, fontsize=9)
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_xlim(0, 1.25 * max(1, *counts))


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(label, color=_MUTED, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _mark(axes: Axes, x: float, text: str, colour: str) -> None:
    """Draw a labelled vertical line."""
    axes.axvline(x, color=colour, linewidth=1.2)
    axes.text(
        x, 1.0, f" {text}", transform=axes.get_xaxis_transform(), va="top", color=colour, fontsize=9
    )


def _fill(axes: Axes, distribution: Mapping[str, Any], colour: str, label: str = "") -> None:
    counts, edges = distribution["counts"], distribution["edges"]
    if distribution["count"]:
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.85, label=label)
        axes.set_ylim(0, 1.2 * max(counts))  # room for a legend
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _log_ticks(axes: Axes, form: Callable[[int], str]) -> None:
    """Set a few ticks, whether the values span a factor of two or a million."""
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    doublings = math.log2(high / low)
    axes.xaxis.set_major_locator(LogLocator(base=2 ** max(1, round(doublings / 8))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"

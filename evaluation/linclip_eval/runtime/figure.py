"""Pictures of a runtime measurement: time, and memory, over the number of tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullFormatter

from linclip_eval.plotting import (
    ATTENTION_COLOURS,
    COLOURS,
    INK,
    MUTED,
    SOFTMAX,
    add_legend,
    dress,
    new_figure,
    ring,
    set_token_axis,
)
from linclip_eval.runtime.fit import CallCost, Scaling

__all__ = ["draw_memory", "draw_times"]

#: Part of an attention's name -> its colour and marker; the first that fits.
_STYLES = {
    "quadratic": (COLOURS[4], "P"),
    "plain": (COLOURS[7], "s"),
    "fla chunk": (COLOURS[2], "s"),
    "cuDNN": (COLOURS[3], "v"),
    "softmax": (SOFTMAX, "^"),
    "SDPA": (SOFTMAX, "^"),
    "Eq. 7": (ATTENTION_COLOURS["Eq. 7"], "o"),
    "Eq. 4": (ATTENTION_COLOURS["Eq. 4"], "D"),
}


def draw_times(scaling: Scaling, *, of: str = "a call") -> Figure:
    """Draw the time ``of`` something in log-log: a column per subject, a row per direction.

    Bands are quantiles of the runs. Dotted lines, over the range of the fits, grow with N^2 beside
    the fastest softmax attention and with N beside the first linear one; a circle marks from where
    on that one is faster.
    """

    def draw(axes: Axes, what: str, direction: str) -> None:
        for name in scaling.attentions[what]:
            if line := scaling.line(what, direction, name):
                lengths, costs, style = list(line), line.values(), _style(name)
                axes.plot(lengths, [cost.seconds for cost in costs], **style)
                low, high = [cost.low for cost in costs], [cost.high for cost in costs]
                axes.fill_between(lengths, low, high, color=style["color"], alpha=0.2, linewidth=0)
        first = scaling.linear(what)[0]
        linear = scaling.line(what, direction, first)
        _draw_guide(axes, scaling.fastest_softmax(what, direction), 2, 1.8)
        _draw_guide(axes, linear, 1, 1 / 1.8)
        place = scaling.crossover(what, direction, first)
        if place is not None:
            heights = np.log([cost.seconds for cost in linear.values()])
            height = np.exp(np.interp(np.log(place), np.log(list(linear)), heights))
            axes.plot(place, height, zorder=3, **ring(INK))
            look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}
            axes.annotate(f"N = {place:.0f}", (place, height), (7, -9), **look)

    handles = [
        Line2D([], [], linestyle=":", color=MUTED, label="slopes 1 and 2"),
        Line2D([], [], label="linear is faster from here on", **ring(INK)),
    ]
    return _draw_panels(scaling, draw, handles, f"time of {of}", "s")


def draw_memory(scaling: Scaling) -> Figure:
    """Draw peak memory of a call, beyond inputs and weights, in log-log; panels as for times."""

    def draw(axes: Axes, what: str, direction: str) -> None:
        for name in scaling.attentions[what]:
            if line := scaling.line(what, direction, name):
                axes.plot(list(line), [cost.peak_bytes for cost in line.values()], **_style(name))

    return _draw_panels(scaling, draw, [], "peak memory of a call", "B")


def _draw_panels(
    scaling: Scaling,
    draw: Callable[[Axes, str, str], None],
    handles: list[Line2D],
    label: str,
    unit: str,
) -> Figure:
    subjects = list(scaling.attentions)
    rows, columns = len(scaling.directions), len(subjects)
    figure = new_figure(1 + max(3 * columns, 7), 0.8 + 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panels, direction in zip(grid, scaling.directions, strict=True):
        for axes, what in zip(panels, subjects, strict=True):
            draw(axes, what, direction)
            set_token_axis(axes, scaling.tokens)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(EngFormatter(unit=unit))
            axes.yaxis.set_minor_formatter(NullFormatter())
            if axes.lines:
                low, high = np.log10(axes.get_ylim())
                axes.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades have labels
            dress(
                axes,
                f"{what}, {direction}",
                xlabel="tokens N" if direction == scaling.directions[-1] else "",
                ylabel=label if what == subjects[0] else "",
            )
    names = dict.fromkeys(name for names in scaling.attentions.values() for name in names)
    labels = dict.fromkeys(name.removesuffix(", causal") for name in names)
    lines = [Line2D([], [], label=name, **_style(name)) for name in labels]
    add_legend(figure, [*lines, *handles])
    return figure


def _draw_guide(axes: Axes, line: dict[int, CallCost], exponent: int, factor: float) -> None:
    """Draw a dotted line of that slope beside the last decade of a line."""
    if len(line) < 2:
        return
    last = max(line)
    lengths = np.array([n for n in line if 10 * n >= last])
    heights = factor * line[last].seconds * (lengths / last) ** exponent
    axes.plot(lengths, heights, linestyle=":", linewidth=1.2, color=MUTED)


def _style(attention: str) -> dict[str, Any]:
    colour, marker = next(style for part, style in _STYLES.items() if part in attention)
    dashes = "--" if "Eq. 4" in attention else "-"
    line = {"linestyle": dashes, "linewidth": 1.5}
    return {"color": colour, "marker": marker, "markersize": 4, **line}

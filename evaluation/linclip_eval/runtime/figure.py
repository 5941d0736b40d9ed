"""Pictures of a runtime measurement: time, and memory, over the number of tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullFormatter

from linclip_eval.plotting import (
    INK,
    LINEAR,
    MUTED,
    SOFTMAX,
    add_legend,
    dress,
    new_figure,
)
from linclip_eval.runtime.fit import Scaling, crossover

__all__ = ["draw_memory", "draw_times"]

_STYLES: dict[str, dict[str, Any]] = {
    "softmax": {"color": SOFTMAX, "marker": "^"},
    "Eq. 7": {"color": LINEAR, "marker": "o"},
    "Eq. 4": {"color": "#58b0e3", "marker": "D", "linestyle": "--"},
}
#: Exponent of the guide beside a line, and the factor between them.
_GUIDES = {"softmax": (2, 1.8), "Eq. 7": (1, 1 / 1.8)}


def draw_times(scaling: Scaling) -> Figure:
    """Time of a call in log-log: a column per subject, a row per direction.

    Bands are the quartiles. Dotted lines, over the range of the fits, grow with N^2 beside softmax
    and with N beside Eq. 7; a circle marks from where on Eq. 7 is faster.
    """

    def draw(axes: Axes, what: str, direction: str) -> None:
        for attention in scaling.attentions:
            line = scaling.line(what, direction, attention)
            lengths = sorted(line)
            medians = [line[n].seconds for n in lengths]
            axes.plot(lengths, medians, **_style(attention))
            axes.fill_between(
                lengths,
                [line[n].low for n in lengths],
                [line[n].high for n in lengths],
                color=_STYLES[attention]["color"],
                alpha=0.2,
                linewidth=0,
            )
            if attention in _GUIDES and scaling.slope(what, direction, attention):
                fitted = np.array(scaling.fitted(what, direction, attention))
                exponent, factor = _GUIDES[attention]
                guide = factor * medians[-1] * (fitted / fitted[-1]) ** exponent
                axes.plot(fitted, guide, linestyle=":", linewidth=1.2, color=MUTED)
        _mark_crossover(
            axes,
            scaling.seconds(what, direction, "softmax"),
            scaling.seconds(what, direction, "Eq. 7"),
        )

    handles = [
        Line2D([], [], linestyle=":", color=MUTED, label="slopes 1 and 2"),
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=9,
            markerfacecolor="none",
            color=INK,
            label="Eq. 7 is faster from here on",
        ),
    ]
    return _draw_panels(scaling, draw, handles, "time of a call", "s")


def draw_memory(scaling: Scaling) -> Figure:
    """Peak memory of a call, beyond inputs and weights, in log-log; panels as for the times."""

    def draw(axes: Axes, what: str, direction: str) -> None:
        for attention in scaling.attentions:
            line = scaling.line(what, direction, attention)
            lengths = sorted(line)
            axes.plot(lengths, [line[n].peak_bytes for n in lengths], **_style(attention))

    return _draw_panels(scaling, draw, [], "peak memory of a call", "B")


def _draw_panels(
    scaling: Scaling,
    draw: Callable[[Axes, str, str], None],
    handles: list[Line2D],
    label: str,
    unit: str,
) -> Figure:
    rows, columns = len(scaling.directions), len(scaling.subjects)
    figure = new_figure(1 + 3 * columns, 0.8 + 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panels, direction in zip(grid, scaling.directions, strict=True):
        for axes, what in zip(panels, scaling.subjects, strict=True):
            draw(axes, what, direction)
            _set_scales(axes, unit)
            dress(
                axes,
                f"{what}, {direction}",
                xlabel="tokens N" if direction == scaling.directions[-1] else "",
                ylabel=label if what == scaling.subjects[0] else "",
            )
    lines = [Line2D([], [], label=name, **_style(name)) for name in scaling.attentions]
    add_legend(figure, [*lines, *handles])
    return figure


def _style(attention: str) -> dict[str, Any]:
    return {"markersize": 4, "linewidth": 1.5, **_STYLES[attention]}


def _mark_crossover(axes: Axes, softmax: dict[int, float], linear: dict[int, float]) -> None:
    place = crossover(softmax, linear)
    if place is None:
        return
    lengths = sorted(linear)
    height = np.exp(np.interp(np.log(place), np.log(lengths), np.log([linear[n] for n in lengths])))
    axes.plot(place, height, marker="o", markersize=9, markerfacecolor="none", color=INK, zorder=3)
    axes.annotate(
        f"N = {place:.0f}",
        (place, height),
        xytext=(7, -9),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )


def _set_scales(axes: Axes, unit: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter(unit=unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = np.log10(axes.get_ylim())
    axes.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades have labels

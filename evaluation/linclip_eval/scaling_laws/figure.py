"""The figure of a scaling study: loss and zero-shot error over compute, with their laws."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from linclip_eval.plotting import (
    LINEAR,
    MUTED,
    SOFTMAX,
    add_legend,
    dress,
    new_figure,
    ring,
    set_log_ticks,
)
from linclip_eval.scaling_laws.power_law import ScalingLaw
from linclip_eval.scaling_laws.runs import QUANTITIES, FinishedRun, Kind, Quantity

__all__ = ["draw_scaling_laws"]

_COLOURS: dict[Kind, str] = {"softmax": SOFTMAX, "linear": LINEAR}
_MARKERS = "os^DvPX*"
_WITHIN_A_DECADE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def draw_scaling_laws(
    runs: Sequence[FinishedRun], laws: Mapping[Quantity, Mapping[Kind, ScalingLaw]]
) -> Figure:
    """Draw a panel per quantity, both axes logarithmic.

    A dot is a run, its shape the size of the model; rings mark the frontier (means over seeds); a
    line is the law with its 95 % bootstrap band.
    """
    figure = new_figure(10.4, 5.0)
    sizes = sorted({run.num_parameters for run in runs})
    markers = dict(zip(sizes, cycle(_MARKERS), strict=False))
    for axes, quantity in zip(figure.subplots(1, len(QUANTITIES)), QUANTITIES, strict=True):
        for kind, law in laws[quantity].items():
            _draw_law(axes, law, _COLOURS[kind])
        for run in runs:
            look = {"marker": markers[run.num_parameters], "color": _COLOURS[run.kind], "s": 30}
            edge = {"edgecolor": "white", "linewidth": 0.7}
            axes.scatter(run.compute, run.value(quantity), zorder=3, **look, **edge)
        _finish(axes, quantity, [run.value(quantity) for run in runs])
    handles = [
        *(Line2D([], [], color=_COLOURS[kind], linewidth=2, label=kind) for kind in laws["loss"]),
        Patch(facecolor=MUTED, alpha=0.25, label="95 % bootstrap band"),
        Line2D([], [], label="frontier", **ring(MUTED)),
    ]
    for size, marker in markers.items():
        label = f"{size / 1e6:.3g} M parameters"
        handles.append(Line2D([], [], marker=marker, linestyle="", color=MUTED, label=label))
    add_legend(figure, handles)
    return figure


def _draw_law(axes: Axes, law: ScalingLaw, colour: str) -> None:
    compute, value = law.frontier
    along = np.geomspace(compute[0], compute[-1], 100)
    axes.plot(along, law.at(along), color=colour, linewidth=1.8, zorder=2)
    axes.fill_between(along, *law.band(along), color=colour, alpha=0.15, linewidth=0, zorder=1)
    axes.plot(compute, value, zorder=4, **ring(colour))


def _finish(axes: Axes, quantity: Quantity, values: Sequence[float]) -> None:
    title = {"loss": "Training loss at the end", "zero-shot error": "Zero-shot error (1 - top-1)"}
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Wide bands of a few runs must not set the range.
    low, high = min(values), max(values)
    room = (high / low) ** 0.25
    axes.set_ylim(low / room, high * room)
    decades = np.log10(high / low)
    set_log_ticks(axes.xaxis, (1, 3), ".0e")
    set_log_ticks(axes.yaxis, _WITHIN_A_DECADE if decades < 1 else (1, 3))
    dress(axes, title[quantity], xlabel="training compute, FLOPs")

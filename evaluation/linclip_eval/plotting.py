"""The one style of figures: bare matplotlib figures, without a window system or pyplot's state."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

__all__ = [
    "ATTENTION_COLOURS",
    "COLOURS",
    "INK",
    "LINEAR",
    "MUTED",
    "SOFTMAX",
    "add_caption",
    "add_legend",
    "dress",
    "new_figure",
    "ring",
    "set_log_ticks",
    "set_token_axis",
]

INK, MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
LINEAR, SOFTMAX = "#2563a8", "#d97706"
#: Colours of models by their order; softmax, where it is among them, comes first.
COLOURS = (SOFTMAX, LINEAR, "#2a9d6f", "#b5408f", "#7c5cc4", "#0e8a9b", "#a16207", "#64748b")
ATTENTION_COLOURS = {"softmax": SOFTMAX, "Eq. 7": LINEAR, "Eq. 4": "#58b0e3"}


def new_figure(width: float, height: float) -> Figure:
    """Return a figure, its size in inches, ready for ``savefig`` and ``add_figure``."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, *, xlabel: str = "", ylabel: str = "") -> None:
    """Set title, labels and a quiet grid; call it after the scales are set."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, weight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def set_log_ticks(axis: Axis, multiples: Sequence[float], form: str = "g") -> None:
    """Label these multiples of powers of ten on a logarithmic axis, and nothing between them."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(StrMethodFormatter(f"{{x:{form}}}"))
    axis.set_minor_locator(NullLocator())


def ring(colour: str) -> dict[str, Any]:
    """Return the style of a hollow circle around a point."""
    face = {"markerfacecolor": "none", "markeredgecolor": colour}
    return {"linestyle": "", "marker": "o", "markersize": 9, "markeredgewidth": 1.2, **face}


def set_token_axis(axes: Axes, tokens: Sequence[int]) -> None:
    """Make the horizontal axis a logarithmic one for all of ``tokens``, ascending numbers."""
    axes.set_xscale("log")
    axes.set_xlim(0.7 * tokens[0], 1.4 * tokens[-1])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(tokens) <= 5:
        axes.set_xticks(tokens)
        axes.xaxis.set_minor_locator(NullLocator())


def add_legend(owner: Figure | Axes, handles: Sequence[Artist] | None = None) -> None:
    """Add a legend below a figure or within axes; without ``handles``, of what is labelled."""
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    if isinstance(owner, Figure):
        handles = list(handles or ())
        longest = max((len(str(handle.get_label())) for handle in handles), default=0)
        columns = min(len(handles), max(1, int(owner.get_figwidth() / (0.6 + 0.08 * longest))))
        owner.legend(handles=handles, loc="outside lower center", ncols=columns, **style)
    else:
        owner.legend(handles=handles, **style)


def add_caption(figure: Figure, text: str) -> None:
    """Write the subject and the origin of a picture above its panels, in a quiet colour."""
    lines = textwrap.fill(text, width=int(14 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=8.5, color=MUTED)

"""How figures look: bare matplotlib figures, without a window system or the state of pyplot."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["COLOURS", "INK", "LINEAR", "MUTED", "SOFTMAX", "add_legend", "dress", "new_figure"]

INK, MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
LINEAR, SOFTMAX = "#2563a8", "#d97706"
#: Of models by their order; softmax, where it is among them, comes first.
COLOURS = (SOFTMAX, LINEAR, "#2a9d6f", "#b5408f", "#7c5cc4", "#0e8a9b", "#a16207", "#64748b")


def new_figure(width: float, height: float) -> Figure:
    """A figure with an Agg canvas, ready for ``savefig`` and ``add_figure``; sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, *, xlabel: str = "", ylabel: str = "") -> None:
    """Title, labels and a quiet grid; call it after the scales are set."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, weight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def add_legend(owner: Figure | Axes, handles: Sequence[Artist] | None = None) -> None:
    """Below a figure, or within its axes; without ``handles``, of what is labelled."""
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    if isinstance(owner, Figure):
        handles = list(handles or ())
        columns = min(len(handles), max(1, int(owner.get_figwidth() / 1.6)))
        owner.legend(handles=handles, loc="outside lower center", ncols=columns, **style)
    else:
        owner.legend(**({} if handles is None else {"handles": list(handles)}), **style)

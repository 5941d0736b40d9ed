"""The figure of diagnostics: a panel per tower and statistic, a line per model over the layers."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from linclip_eval.diagnostics.measure import LayerStatistic
from linclip_eval.plotting import COLOURS, INK, MUTED, add_legend, dress, new_figure, set_log_ticks

__all__ = ["draw_diagnostics"]

#: Statistic -> title of its panel.
_PANELS = {
    "entropy": "Entropy of a row, over log n",
    "contrast": "Largest over mean weight",
    "variation": "Spread of weights over their mean",
    "effective_rank": "Effective rank, over N",
    "gain": "Sum of a row",
    "gain_variation": "Spread of that sum over its mean",
    "branch_ratio": "Attention branch over residual",
    "token_similarity": "Cosine of tokens",
}
#: Statistics of uniform attention, as far as they do not depend on the number of tokens.
_UNIFORM = {"entropy": 1.0, "contrast": 1.0, "variation": 0.0}


def draw_diagnostics(models: Mapping[str, Sequence[LayerStatistic]]) -> Figure:
    """Draw the statistics of each model, by its label, over the layers."""
    colours = dict(zip(models, cycle(COLOURS), strict=False))
    figure = new_figure(14.5, 12.4)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, tower in zip(parts, ("vision", "text"), strict=True):
        part.suptitle(
            f"{tower.capitalize()} tower", x=0.01, ha="left", fontsize=13, color=INK, weight="bold"
        )
        for axes, statistic in zip(part.subplots(2, 4).flat, _PANELS, strict=True):
            for name, found in models.items():
                here = [row for row in found if row.tower == tower]
                _draw_lines(axes, here, statistic, colours[name])
            _finish(axes, statistic)
    add_legend(
        figure,
        [
            *(
                Line2D([], [], color=colour, marker="o", markersize=4, label=name)
                for name, colour in colours.items()
            ),
            Patch(color=MUTED, alpha=0.2, label="5 to 95 % of heads and samples"),
            Line2D([], [], color=MUTED, linestyle="--", label="bound of 1 + cos; branch at init"),
            Line2D([], [], color=MUTED, linestyle=":", label="uniform attention"),
        ],
    )
    return figure


def _draw_lines(axes: Axes, found: Sequence[LayerStatistic], statistic: str, colour: str) -> None:
    rows = [row for row in found if row.statistic == statistic]
    layers = [row.layer for row in rows]
    low, high = [row.low for row in rows], [row.high for row in rows]
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(layers, [row.mean for row in rows], "o-", color=colour, markersize=4, linewidth=1.6)
    references = {
        "contrast": ("contrast_bound", "--", colour),
        "effective_rank": ("uniform_rank", ":", MUTED),
        "branch_ratio": ("branch_ratio_at_init", "--", colour),
    }
    if statistic in references:
        name, style, shade = references[statistic]
        rows = [row for row in found if row.statistic == name]
        means = [row.mean for row in rows]
        axes.plot([row.layer for row in rows], means, style, color=shade, linewidth=1.2)


def _finish(axes: Axes, statistic: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if statistic in ("contrast", "gain", "branch_ratio"):
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis, (1, 2, 5))
    if statistic in _UNIFORM:
        axes.axhline(_UNIFORM[statistic], color=MUTED, linestyle=":", linewidth=1.2)
    dress(axes, _PANELS[statistic], xlabel="layer")

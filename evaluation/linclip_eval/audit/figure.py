"""The figure of an audit: each part of the decision's information, with interval and null."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from linclip_eval.audit.estimate import Estimate
from linclip_eval.plotting import INK, LINEAR, MUTED, add_legend, dress, new_figure

__all__ = ["draw_audit"]


def draw_audit(estimates: Sequence[Estimate], names: Mapping[str, str]) -> Figure:
    """Draw a bar for each estimate, its interval, and the 95 % quantile of shuffled decisions.

    Args:
        estimates: The parts of a decomposition.
        names: Part -> its label.
    """
    figure = new_figure(7.2, 3.4)
    axes = figure.subplots()
    rows = list(range(len(estimates)))[::-1]
    axes.barh(rows, [each.bits for each in estimates], height=0.6, color=LINEAR)
    for row, each in zip(rows, estimates, strict=True):
        axes.plot([each.low, each.high], [row, row], color=INK, linewidth=1.4)
        ends = [row - 0.4, row + 0.4]
        axes.plot([each.null_high, each.null_high], ends, color=MUTED, linestyle=":")
    axes.set_yticks(rows, [names[each.part] for each in estimates])
    dress(axes, "What the decision is made from", xlabel="bits")
    axes.set_xlim(left=0)
    add_legend(
        figure,
        [
            Patch(color=LINEAR, label="estimate"),
            Line2D([], [], color=INK, label="95 % interval"),
            Line2D([], [], color=MUTED, linestyle=":", label="95 % of shuffled decisions"),
        ],
    )
    return figure

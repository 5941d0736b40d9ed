"""Pictures of the measurements of :mod:`experiments.theory`: dots are sampled, lines predicted."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.in_context import Risk
from experiments.token_limit import Distance, curve_of
from linclip_eval.plotting import (
    COLOURS,
    LINEAR,
    MUTED,
    SOFTMAX,
    add_legend,
    dress,
    new_figure,
    set_log_ticks,
    set_token_axis,
)

__all__ = ["draw_inline", "draw_limit", "draw_regression"]

GREEN, PURPLE = COLOURS[2], COLOURS[4]


def draw_regression(risks: Sequence[Risk]) -> Figure:
    """Return a figure of the risk over examples, over the factor on W, and over drift."""
    figure = new_figure(12, 4.2)
    over_examples, over_factor, over_drift = figure.subplots(1, 3)
    isotropic = [risk for risk in risks if risk.setting == "isotropic"]
    best = [risk for risk in isotropic if risk.factor == 1]
    for name, label, colour in (
        ("step", "one step, best W", LINEAR),
        ("ridge", "ridge regression", GREEN),
        ("Eq. 4", "Eq. 4, unit q and k", SOFTMAX),
        ("Eq. 7", "Eq. 7, unit q and k", PURPLE),
    ):
        found = [risk for risk in best if risk.predictor == name]
        _draw_risks(over_examples, found, "num_examples", label, colour)
    over_examples.set_xscale("log")
    over_examples.set_yscale("log")
    over_examples.set_ylim(0.1, 6)
    set_log_ticks(over_examples.xaxis, (1, 2, 5))
    set_log_ticks(over_examples.yaxis, (1, 2, 5))
    dress(over_examples, "Risk, d = 5, noise 0.3", xlabel="examples")
    add_legend(over_examples)

    found = [risk for risk in isotropic if risk.predictor == "step" and risk.num_examples == 20]
    _draw_risks(over_factor, found, "factor", "", LINEAR)
    dress(over_factor, "Risk at 20 examples", xlabel="factor on the best W")

    drift = [risk for risk in risks if risk.setting == "drift" and risk.factor == 1]
    for name, label, colour in (
        ("step", "equal weights", LINEAR),
        ("weighted", "H3's weights", SOFTMAX),
        ("ridge", "ridge regression, equal weights", GREEN),
    ):
        found = [risk for risk in drift if risk.predictor == name]
        _draw_risks(over_drift, found, "persistence", label, colour)
    over_drift.invert_xaxis()
    dress(over_drift, "Risk when the task drifts", xlabel="correlation of neighbours' tasks")
    add_legend(over_drift)
    return figure


def draw_limit(distances: Sequence[Distance]) -> Figure:
    """Return a figure of the distances of softmax and linear attention from the linear limit."""
    figure = new_figure(12, 4.2)
    softmax, linear, ratio = figure.subplots(1, 3)
    for colour, square in zip(COLOURS, _squares(distances), strict=False):
        label = f"v² = {square:g}"
        _draw_distances(softmax, curve_of(distances, "softmax", "limit", square), label, colour)
        _draw_distances(linear, curve_of(distances, "linear", "limit", square), label, colour)
        found = curve_of(distances, "softmax", "limit", square)
        ratios = [each.rms / each.predicted for each in found]
        errors = [each.rms_error / each.predicted for each in found]
        scaled = [each.tokens / math.exp(2 * square) for each in found]
        ratio.errorbar(scaled, ratios, errors, color=colour, marker="o", markersize=4)
    ratio.axhspan(0.9, 1.1, color=MUTED, alpha=0.15, linewidth=0)
    ratio.set_xscale("log")
    _dress_distance(softmax, "Softmax from its limit", distances)
    _dress_distance(linear, "Linear attention from the same limit", distances)
    dress(ratio, "Softmax: sampled over predicted", xlabel="tokens over exp(2v²)")
    ratio.set_ylim(0, 1.2)
    add_legend(softmax)
    return figure


def draw_inline(distances: Sequence[Distance]) -> Figure:
    """Return a figure of InLine's distances from the limit and from softmax, and of their gap."""
    figure = new_figure(12, 4.2)
    limit, softmax, gap = figure.subplots(1, 3)
    for output, label, colour in (
        ("softmax", "softmax", SOFTMAX),
        ("inline", "InLine", LINEAR),
        ("affine", "affine scores, keys not centred", GREEN),
    ):
        _draw_distances(limit, curve_of(distances, output, "limit", 1.0), label, colour)
    _dress_distance(limit, "From the limit, v² = 1, mean not 0", distances)
    add_legend(limit)
    for colour, square in zip(COLOURS, _squares(distances), strict=False):
        found = curve_of(distances, "softmax", "inline", square)
        _draw_distances(softmax, found, f"v² = {square:g}", colour)
    _dress_distance(softmax, "Softmax from InLine", distances)
    add_legend(softmax)
    for distribution, colour in (("normal", LINEAR), ("exponential", SOFTMAX), ("sign", GREEN)):
        found = curve_of(distances, "softmax", "inline", 0.25, distribution)
        tokens, rms = [each.tokens for each in found], [each.rms for each in found]
        gap.plot(tokens, rms, color=colour, marker="o", markersize=4, label=distribution)
        if found[0].gap > 0:
            gap.axhline(found[0].gap, color=MUTED, linewidth=1, linestyle="--")
    _dress_distance(gap, "From InLine, v² = 0.25; dashed: gap", distances)
    add_legend(gap)
    return figure


def _draw_risks(axes: Axes, risks: Sequence[Risk], over: str, label: str, colour: str) -> None:
    along = [getattr(risk, over) for risk in risks]
    sampled = [risk.sampled for risk in risks]
    errors = [risk.sampling_error for risk in risks]
    predicted = [risk.predicted for risk in risks if risk.predicted is not None]
    line = "" if predicted else ":"
    axes.errorbar(
        *(along, sampled, errors),
        color=colour,
        marker="o",
        markersize=4,
        linestyle=line,
        label=label,
    )
    if predicted:
        axes.plot(along, predicted, color=colour, linewidth=1.2)


def _draw_distances(axes: Axes, distances: Sequence[Distance], label: str, colour: str) -> None:
    tokens = [each.tokens for each in distances]
    axes.plot(tokens, [each.rms for each in distances], "o", color=colour, ms=4, label=label)
    axes.plot(tokens, [each.predicted for each in distances], color=colour, linewidth=1.2)


def _dress_distance(axes: Axes, title: str, distances: Sequence[Distance]) -> None:
    set_token_axis(axes, _token_counts(distances))
    axes.set_yscale("log")
    dress(axes, title, xlabel="tokens", ylabel="RMS distance")


def _squares(distances: Sequence[Distance]) -> list[float]:
    return sorted({each.v_squared for each in distances})


def _token_counts(distances: Sequence[Distance]) -> list[int]:
    return sorted({each.tokens for each in distances})

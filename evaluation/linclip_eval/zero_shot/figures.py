"""Pictures of single predictions, for TensorBoard's ``add_figure``."""

import textwrap
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from linclip_eval.plotting import INK, MUTED, new_figure
from linclip_eval.zero_shot.evaluate import Prediction

__all__ = ["draw_predictions"]

_TRACK = "#eef0f3"
_RIGHT, _WRONG, _OTHER = "#2a9d6f", "#d1495b", "#b8c0cc"


def draw_predictions(predictions: Sequence[Prediction]) -> Figure:
    """Draw each image with its caption and the probabilities of its most likely classes.

    The bar of the true class is green, a wrong top class red, the rest grey. A true class that is
    not among the most likely ones is named below the bars.

    Args:
        predictions: At least one; images [3, H, W] are normalised with open_clip's mean and std.

    Raises:
        ValueError: for no predictions.
    """
    if not predictions:
        raise ValueError("predictions ([]) must hold at least one prediction")
    columns = min(2, len(predictions))
    rows = -(-len(predictions) // columns)
    figure = new_figure(5.6 * columns, 2.3 * rows)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.0, 1.35] * columns)
    cells = grid.reshape(rows * columns, 2)
    for (image_axes, bar_axes), prediction in zip(cells, predictions, strict=False):
        _draw_image(image_axes, prediction)
        _draw_bars(bar_axes, prediction)
    for axes in cells[len(predictions) :].flat:
        axes.set_axis_off()
    return figure


def _draw_image(axes: Axes, prediction: Prediction) -> None:
    axes.imshow(_to_pixels(prediction.image).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(_TRACK)
    lines = textwrap.wrap(prediction.caption, 32, max_lines=2, placeholder=" …")
    axes.set_xlabel(_plain("\n".join(lines)), fontsize=8, color=INK)


def _draw_bars(axes: Axes, prediction: Prediction) -> None:
    for place, (name, probability) in enumerate(
        zip(prediction.top_classes, prediction.top_probabilities, strict=True)
    ):
        is_true = name == prediction.true_class
        colour = _RIGHT if is_true else _WRONG if place == 0 else _OTHER
        axes.barh(place, 1.0, height=0.3, color=_TRACK)
        axes.barh(place, probability, height=0.3, color=colour)
        label = _plain(textwrap.shorten(name, 34, placeholder=" …"))
        weight = "bold" if is_true else "normal"
        axes.text(0, place - 0.28, label, fontsize=8, color=INK, weight=weight, va="bottom")
        share = f"{100 * probability:.1f} %"
        axes.text(1, place - 0.28, share, fontsize=8, color=MUTED, ha="right", va="bottom")
    axes.set(xlim=(0, 1), ylim=(4.4, -0.9), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if prediction.true_class not in prediction.top_classes:
        true_class = textwrap.shorten(prediction.true_class, 34, placeholder=" …")
        axes.set_xlabel(_plain(f"true: {true_class}"), fontsize=8, color=_RIGHT, weight="bold")


def _to_pixels(image: Tensor) -> Tensor:
    mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    deviation = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    return (image.float() * deviation + mean).clamp(0, 1).permute(1, 2, 0)  # [H, W, 3]


def _plain(text: str) -> str:
    """Escape dollar signs, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")

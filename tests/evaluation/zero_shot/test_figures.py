"""Figures of predictions: their content, and that they do not touch pyplot."""

import sys

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from linclip_eval.zero_shot.evaluate import Prediction
from linclip_eval.zero_shot.figures import draw_predictions


def prediction(
    true_class: str = "cat", pixel: float = 0.25, size: tuple[int, int] = (8, 8)
) -> Prediction:
    mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    deviation = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    return Prediction(
        key="000000007",
        caption="a cat for $5, or two for $8",
        image=(torch.full((3, *size), pixel) - mean) / deviation,
        true_class=true_class,
        top_classes=("dog", "cat", "cow", "hen", "fox"),
        top_probabilities=(0.5, 0.3, 0.1, 0.06, 0.04),
    )


@pytest.mark.parametrize("size", [(8, 8), (8, 20)])
def test_image_caption_and_bars_are_shown(size):
    figure = draw_predictions([prediction(size=size)])
    image_axes, bar_axes = figure.axes
    (image,) = [child for child in image_axes.get_children() if isinstance(child, AxesImage)]
    torch.testing.assert_close(torch.tensor(image.get_array()), torch.full((*size, 3), 0.25))
    assert image_axes.get_xlabel().replace("\\$", "$") == "a cat for $5, or two for $8"
    bars = [bar for bar in bar_axes.patches if bar.get_width() < 1]
    assert [bar.get_width() for bar in bars] == [0.5, 0.3, 0.1, 0.06, 0.04]
    wrong, right, *others = [to_hex(bar.get_facecolor()) for bar in bars]
    assert len({wrong, right, others[0]}) == 3
    assert set(others) == {others[0]}
    assert "30.0 %" in [text.get_text() for text in bar_axes.texts]


def test_true_class_outside_the_five_is_named():
    figure = draw_predictions([prediction(true_class="whale")])
    assert figure.axes[1].get_xlabel() == "true: whale"
    assert draw_predictions([prediction()]).axes[1].get_xlabel() == ""


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 3, 8])
def test_figures_render_without_pyplot_state(count, tmp_path):
    figure = draw_predictions([prediction() for _ in range(count)])
    figure.savefig(tmp_path / "predictions.png")
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    assert pixels.view(-1, 4)[:, :3].unique(dim=0).shape[0] > 50
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_tensorboard_takes_the_figure(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("eval/predictions", draw_predictions([prediction()]), global_step=3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Images("eval/predictions")
    assert event.step == 3
    assert event.width > 400


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match=r"predictions \(\[\]\) must hold at least one"):
        draw_predictions([])

"""A held-out folder on disk, scored by a model whose right answers are known."""

import io
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from linclip_eval.held_out import HeldOutEvaluator

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourModel:
    """Knows three colours: the mean colour of an image, the colour words of a text."""

    def __init__(self) -> None:
        tokenizer = open_clip.SimpleTokenizer(context_length=8)
        self.word_axis = torch.zeros(49408, 3)
        for axis, name in enumerate(COLOURS):
            self.word_axis[tokenizer.encode(name), axis] = 1.0

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.word_axis[texts].sum(dim=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars with seven one-coloured images; the last one carries a wrong label."""
    (tmp_path / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c} image\nall {c}\n")
    (tmp_path / "test").mkdir()
    labels = [0, 1, 2, 2, 1, 1, 0]
    shown = [*labels[:-1], 2]
    for shard, places in enumerate([range(4), range(4, 7)]):
        with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as tar:
            for place in places:
                image = io.BytesIO()
                colour = list(COLOURS.values())[shown[place]]
                Image.new("RGB", (20, 16), colour).save(image, format="JPEG")
                _add(tar, f"{place:09d}.jpg", image.getvalue())
                _add(tar, f"{place:09d}.cls", str(labels[place]).encode())
    return tmp_path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def evaluator(folder: Path, **options) -> HeldOutEvaluator:
    return HeldOutEvaluator(
        folder,
        image_size=16,
        context_length=8,
        batch_size=2,
        device=torch.device("cpu"),
        **options,
    )


def test_folder_is_scored_exactly(folder):
    result = evaluator(folder, num_images=7).score(ColourModel())
    assert result.classnames == tuple(COLOURS)
    assert result.class_samples.tolist() == [2, 3, 2]
    assert result.class_top1.tolist() == [1, 3, 2]
    assert result.top1 == 6 / 7
    assert result.mean_per_class_recall == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert [p.key for p in result.predictions] == [f"{place:09d}" for place in range(7)]
    wrong = result.predictions[-1]
    assert (wrong.true_class, wrong.top_classes[0]) == ("red", "blue")


def test_call_draws_the_predictions(folder):
    class Writer:
        def __init__(self) -> None:
            self.written: list[tuple[int, str, Figure]] = []

        def figure(self, step: int, tag: str, figure: Figure) -> None:
            self.written.append((step, tag, figure))

    writer = Writer()
    values = evaluator(folder, num_images=3)(ColourModel(), writer, 40)
    assert values["eval/zeroshot_top1"] == 6 / 7
    ((step, tag, figure),) = writer.written
    assert (step, tag) == (40, "eval/predictions")
    assert len([axes for axes in figure.axes if axes.images]) == 3


def test_label_beyond_the_class_list_is_refused(folder):
    (folder / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"label \(2\) must be in \[0, 2\)"):
        evaluator(folder).score(ColourModel())

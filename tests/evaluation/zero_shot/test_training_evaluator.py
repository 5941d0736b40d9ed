"""A held-out folder on disk, scored by a model whose predictions are known."""

import io
import json
import multiprocessing
import re
import shutil
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor

from ds_linclip.config import Config, NamedSet, load_config
from ds_linclip.data import EvalTransform
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.trainer import train
from helpers import EMBEDDED
from linclip_eval.training.evaluators import Evaluators
from linclip_eval.zero_shot.task import ZeroShotTask
from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourModel:
    """Encodes an image as its mean colour and a text as its colour words."""

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
    task = ZeroShotTask.open(
        folder, transform=EvalTransform(PreprocessCfg(size=(16, 16))), batch_size=2
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    return HeldOutEvaluator(task=task, tokenizer=tokenizer, device=torch.device("cpu"), **options)


def test_folder_is_scored_exactly(folder):
    result = evaluator(folder, num_images=7).score(ColourModel())
    assert result.classes.ids == tuple(COLOURS)
    assert result.class_samples.tolist() == [2, 3, 2]
    assert result.class_hits(1).tolist() == [1, 3, 2]
    assert result.topk(1) == 6 / 7
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


def test_broken_folder_is_refused_before_the_first_evaluation(folder):
    classnames = folder / "classnames.txt"
    classnames.write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"eval\.data .* not among the 2 of the list: 2"):
        evaluator(folder)
    classnames.write_text("red\ngreen\nblue\n")
    for tar in (folder / "test").iterdir():
        tar.unlink()
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be a folder with tars"):
        evaluator(folder)


def test_both_template_forms_are_read(folder):
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("a {} image\nall {c}\n")
    assert evaluator(folder).score(ColourModel()).topk(1) == 6 / 7
    templates.write_text("a {c} image\nan image\n")
    with pytest.raises(
        ValueError, match=r"eval\.data .* templates, line 2: template \('an image'\) must"
    ):
        evaluator(folder)


def test_evaluator_is_built_from_the_config(folder):
    config = Config()
    config.model.vision.image_size, config.model.text.context_length = (16, 24), 8
    config.data.num_workers = 2
    config.eval.batch_size, config.log.num_images = 2, 3
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"eval\.data \(None\) must name a held-out folder"):
        HeldOutEvaluator.from_config(config, device=device)
    config.eval.data = str(folder)
    model = RecordingModel()
    result = HeldOutEvaluator.from_config(config, device=device).score(model)
    assert result.topk(1) == 6 / 7
    assert len(result.predictions) == 3
    assert model.image_shapes == [(2, 3, 16, 24)] * 3 + [(1, 3, 16, 24)]
    assert model.most_workers == 2


def test_unreadable_images_within_the_limit_are_counted(folder, caplog):
    with tarfile.open(folder / "test" / "1.tar", "a") as tar:
        _add(tar, "undecodable.jpg", b"<html>")
        _add(tar, "undecodable.cls", b"0")
    (folder / "classnames.txt").write_text("\n".join([*COLOURS, "grey"]))
    config = Config()
    config.model.vision.image_size, config.model.text.context_length = (16, 16), 8
    config.data.num_workers, config.log.num_images, config.eval.data = 0, 0, str(folder)
    device = torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"undecodable of .*1\.tar must be .* max_bad_samples is 0"
    ):
        HeldOutEvaluator.from_config(config, device=device).score(ColourModel())
    config.eval.max_bad_samples = 1
    values = HeldOutEvaluator.from_config(config, device=device)(ColourModel(), None, 1)
    assert (values["eval/zeroshot_top1"], values["eval/bad_samples"]) == (6 / 8, 1)
    assert "classes without an image: 1 of 4 (grey)" in caplog.text
    assert "1 of 8 images cannot be read (image_undecodable: 1 (sample undecodable" in caplog.text


class RecordingModel(ColourModel):
    """Records the shapes of its inputs, and the number of worker processes during a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.image_shapes: list[tuple[int, ...]] = []
        self.most_workers = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.image_shapes.append(tuple(images.shape))
        self.most_workers = max(self.most_workers, len(multiprocessing.active_children()))
        return super().encode_image(images)


def test_several_sets_are_scored_under_their_own_names(folder, tmp_path_factory):
    easy = tmp_path_factory.mktemp("sets") / "easy"
    shutil.copytree(folder, easy)
    (easy / "test" / "1.tar").unlink()  # with the wrong label
    config = Config()
    config.model.vision.image_size, config.model.text.context_length = (16, 16), 8
    config.data.num_workers, config.log.num_images, config.eval.data = 0, 0, str(folder)
    config.eval.sets = [NamedSet(name="easy", data=str(easy))]
    device = torch.device("cpu")
    evaluators = Evaluators.from_config(config, device=device)
    assert evaluators is not None
    values = evaluators(ColourModel(), None, 1)
    assert (values["eval/zeroshot_top1"], values["eval/easy/top1"]) == (6 / 7, 1.0)
    assert values.keys() == evaluators.metrics.keys()
    config.eval.data = None
    assert Evaluators.from_config(config, device=device).metrics.keys() == {
        *("eval/easy/top1", "eval/easy/top5", "eval/easy/bad_samples"),
    }
    config.eval.sets[0].data = str(folder / "absent")
    with pytest.raises(ValueError, match=r"eval\.sets \(easy\): eval\.data \(.*absent\) must be"):
        Evaluators.from_config(config, device=device)
    config.eval.sets = []
    assert Evaluators.from_config(config, device=device) is None


def _write_results(store: Path, sound: Path, broken: Path) -> None:
    """Score a sound folder, and one in which the second rank finds an undecodable image."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    result = evaluator(sound, group=group, num_images=2).score(ColourModel())
    opened = evaluator(broken, group=group)
    try:
        opened.score(ColourModel())
        message = None
    except ValueError as error:
        message = str(error)
    torch.save(
        (result.topk(1), [p.key for p in result.predictions], message),
        store / f"{dist.get_rank()}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_score_and_fail_together(folder, tmp_path_factory):
    broken = tmp_path_factory.mktemp("broken") / "folder"
    shutil.copytree(folder, broken)
    with tarfile.open(broken / "test" / "1.tar", "a") as tar:
        _add(tar, "undecodable.jpg", b"<html>")  # the eighth sample: the second rank's
        _add(tar, "undecodable.cls", b"0")
    store = tmp_path_factory.mktemp("ranks")
    run_ranks(2, _write_results, store, folder, broken)
    answers = [torch.load(store / f"{rank}.pt") for rank in range(2)]
    assert [top1 for top1, _, _ in answers] == [6 / 7, 6 / 7]
    assert [keys for _, keys, _ in answers] == [["000000000", "000000001"], []]
    assert answers[0][2] == answers[1][2]
    assert re.match(
        r".* undecodable of .* readable: image_undecodable; .* \(on rank 1 of", answers[0][2]
    )


def _train(config: Config) -> None:
    mesh = Mesh.create(config.parallel)
    evaluators = Evaluators.from_config(config, device=mesh.device, group=mesh.dp.group)
    train(config, mesh, evaluators)
    mesh.close()


@pytest.mark.distributed
def test_training_is_unchanged_by_evaluation(embedded_overrides, tmp_path):
    losses, scores = [], []
    for every_steps in (2, 100):
        config = load_config(
            EMBEDDED,
            [
                *(*embedded_overrides, "train.steps=6", "optim.warmup_steps=1"),
                *(
                    "train.global_batch_size=16",
                    "model.vision.layers=1",
                    "model.text.layers=1",
                    "log.every_steps=1",
                ),
                *("data.num_workers=0", "model.vision.patch_dropout=0.5"),
                *(f"eval.every_steps={every_steps}", f"output_dir={tmp_path}"),
                *(f"name=every{every_steps}", "checkpoint.every_steps=100"),
            ],
        )
        run_ranks(2, _train, config)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
        scores.append([r["step"] for r in records if "eval/zeroshot_top1" in r])
    assert scores == [[2, 4, 6], [6]]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]

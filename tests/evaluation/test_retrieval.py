"""Retrieval against open_clip's metrics and ranks by hand, on three ranks, and as a command."""

import csv
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from open_clip_train.train import get_clip_metrics
from PIL import Image

from ds_linclip.config import ModelConfig, TextTower, VisionTower
from ds_linclip.data.prepare.make_shards import make_scenes
from ds_linclip.data.prepare.shard_writer import RawSample, write_labelled_folder
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers.stand_in_data import StandInData, random_data, tiny_clip, tokenizer
from linclip_eval.features import Features
from linclip_eval.retrieval import RetrievalResult, rank_captions, retrieval
from linclip_launch.cli import main


def found(data: StandInData, **options: object) -> RetrievalResult:
    model = tiny_clip()
    return retrieval(
        model.encode_image,
        model.encode_text,
        data,
        tokenizer=tokenizer(),
        device="cpu",
        **options,
    )


def features_of(
    images: Sequence[Sequence[float]], texts: Sequence[Sequence[float]], owners: Sequence[int]
) -> Features:
    """Return features scaled to length 1."""
    rows = [np.array(of, np.float32).reshape(len(of), -1) for of in (images, texts)]
    images, texts = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in rows)
    return Features(
        images=images,
        labels=np.zeros(len(images), np.int64),
        keys=tuple(f"s{i}" for i in range(len(images))),
        texts=texts,
        captions=tuple(f"caption {i}" for i in range(len(texts))),
        owners=np.array(owners, np.int64),
        unreadable=(),
        unreadable_labels=np.empty(0, np.int64),
    )


@pytest.mark.parametrize("num_images", [37, 40])
def test_one_caption_per_image_gives_the_metrics_of_open_clip(num_images):
    result = found(random_data(num_images, [1]))
    expected = get_clip_metrics(
        torch.from_numpy(result.features.images),
        torch.from_numpy(result.features.texts),
        torch.tensor(100.0),
    )
    assert result.metrics() == pytest.approx(expected, rel=0, abs=1e-12)
    assert result.metrics().keys() == expected.keys()
    assert 0 < expected["image_to_text_R@1"] + expected["text_to_image_R@5"] < 1


def test_several_captions_by_hand():
    # Angles in degrees: images at 0, 40 and 90; captions 5, 50 of the first, 44 of the second, 20
    # of the third.
    angles = [np.radians(of) for of in ([0, 40, 90], [5, 50, 44, 20])]
    images, texts = (np.stack([np.cos(of), np.sin(of)], axis=1) for of in angles)
    result = rank_captions(features_of(images, texts, [0, 0, 1, 2]), device="cpu")
    # From 0: 5 comes first. From 40: 44. From 90: 50, 44, 20, 5, so 20 is the third.
    assert result.image_to_text.tolist() == [1, 1, 3]
    # From 5: 0. From 50: 40, 90, 0. From 44: 40. From 20: 0 and 40 within rounding, then 90.
    assert result.text_to_image.tolist() == [1, 3, 1, 3]
    metrics = result.metrics()
    assert metrics["image_to_text_R@1"] == pytest.approx(2 / 3)
    assert metrics["image_to_text_R@5"] == 1
    assert metrics["image_to_text_mean_rank"] == pytest.approx(5 / 3)
    assert metrics["image_to_text_median_rank"] == 1
    assert metrics["text_to_image_R@1"] == 0.5
    assert metrics["text_to_image_mean_rank"] == 2
    assert metrics["text_to_image_median_rank"] == 2


def test_median_of_an_even_number_is_rounded_down():
    result = rank_captions(features_of([[1.0], [1.0]], [[1.0], [1.0]], [0, 1]), device="cpu")
    assert result.text_to_image.tolist() == [1, 2]
    assert result.metrics()["text_to_image_median_rank"] == 1


def test_collapsed_features_score_by_chance():
    """The lower index comes first among equal similarities, whether it is right or not."""
    num = 50
    result = rank_captions(
        features_of(np.ones((num, 3)), np.ones((num, 3)), list(range(num))), device="cpu"
    )
    assert result.image_to_text.tolist() == list(range(1, num + 1))
    assert result.metrics()["image_to_text_R@1"] == 1 / num
    assert result.metrics()["text_to_image_R@10"] == 10 / num


def test_image_without_a_caption_is_an_error_or_not_found():
    captions = ["a red dog", "", "a cat", "  \n "]
    images = random_data(4, [1])._images
    data = StandInData(images, [0, 1, 2, 3], captions)
    with pytest.raises(ValueError, match=r"image s1 must have a caption; 2 of 4 have none"):
        found(data)
    result = found(data, strict=False)
    assert result.features.uncaptioned == ("s1", "s3")
    assert (result.num_images, result.num_captions) == (4, 2)
    assert result.image_to_text[[1, 3]].tolist() == [3, 3]
    assert result.recall("image_to_text", 2) == 0.5


def test_unreadable_image_is_not_found():
    result = found(random_data(6, [2], unreadable=[2]))
    assert (result.num_images, result.num_captions) == (6, 10)
    assert result.image_to_text[-1] == 11
    assert result.recall("image_to_text", 10) == pytest.approx(5 / 6)


def test_data_without_captions_are_refused():
    data = StandInData(torch.ones(2, 3, 8, 8), [0, 1], ["", "\n"])
    with pytest.raises(ValueError, match=r"captions \(\[\]\) must hold at least one caption"):
        found(data, strict=False)


def _write_results(folder: Path) -> None:
    """Write the results of one of three ranks for the test below."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    data = random_data(38, [3, 1, 2], unreadable=[5])
    answers = {"result": found(data, group=group), "num_read": data.num_read}
    for name, data in {
        "refused": random_data(9, [1], refused=6),
        "uncaptioned": random_data(9, [1, 1, 0]),
    }.items():
        with pytest.raises(ValueError) as raised:
            found(data, group=group)
        answers[name] = str(raised.value)
    (folder / f"{dist.get_rank()}.pickle").write_bytes(pickle.dumps(answers))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_three_ranks_give_the_result_of_one(tmp_path):
    run_ranks(3, _write_results, tmp_path)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks
    alone = found(random_data(38, [3, 1, 2], unreadable=[5]))
    torch.set_num_threads(num_threads)
    every = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(3)]
    assert [answers["num_read"] for answers in every] == [14, 12, 12]
    for answers in every:
        result = answers["result"]
        for name, value in vars(alone.features).items():
            assert np.array_equal(getattr(result.features, name), value), name
        assert np.array_equal(result.image_to_text, alone.image_to_text)
        assert np.array_equal(result.text_to_image, alone.text_to_image)
        assert result.metrics() == alone.metrics()
        assert answers["refused"] == "sample s6 must be readable (on rank 1 of 3)"
        assert answers["uncaptioned"] == "image s2 must have a caption; 3 of 9 have none"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder with random weights."""
    config = ModelConfig(
        embed_dim=16,
        vision=VisionTower(image_size=(32, 32), patch_size=8, width=32, layers=1, head_width=16),
        text=TextTower(context_length=16, width=32, layers=1, heads=2),
    )
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    mesh = Mesh.create()
    export_folder(CLIP(config, mesh), folder)
    mesh.close()
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, num_shards=1, samples_per_shard=1, image_size=32, num_test=24)
    return folder / "test"


def test_command_writes_numbers_summary_ranks_and_figure(model_folder, scenes, tmp_path):
    out = tmp_path / "out"
    main(
        [
            "eval",
            "retrieval",
            str(model_folder),
            "--data",
            str(scenes),
            "--out",
            str(out),
            "--num-workers",
            "0",
        ]
    )
    numbers = json.loads((out / "results.json").read_text())
    assert (numbers["num_images"], numbers["num_captions"]) == (24, 24)
    with (out / "ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for direction in ("image_to_text", "text_to_image"):
        ranks = [int(row["rank"]) for row in rows if row["direction"] == direction]
        assert len(ranks) == 24
        assert numbers[f"{direction}_mean_rank"] == pytest.approx(np.mean(ranks))
        assert numbers[f"{direction}_R@5"] == np.mean(np.array(ranks) <= 5)
    assert all(row["caption"] for row in rows[24:])
    summary = (out / "summary.md").read_text()
    assert "24 images with 24 captions" in summary
    assert "| image to text |" in summary
    assert "(recall.png)" in summary
    assert "not found" not in summary
    with Image.open(out / "recall.png") as picture:
        assert min(picture.size) > 300


def _captioned(captions: Sequence[str]) -> Iterator[RawSample]:
    for number, caption in enumerate(captions):
        image = Image.new("RGB", (32, 32), (20 * number, 255 - 30 * number, 90))
        yield RawSample(image, caption, f"url/{number}", (32, 32), label=0)


def test_command_reports_images_without_captions(model_folder, tmp_path, capsys):
    captions = ["a dog\na big dog", "", "a cat"]
    write_labelled_folder(
        tmp_path / "data", _captioned(captions), classnames=["x"], templates=["a {c}"]
    )
    out = tmp_path / "out"
    words = ["eval", "retrieval", str(model_folder), "--data", str(tmp_path / "data")]
    words += ["--out", str(out), "--num-workers", "0"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "image s0000001 must have a caption; 1 of 3 have none" in error
    assert not out.exists()
    assert main([*words, "--lenient"]) == 0
    numbers = json.loads((out / "results.json").read_text())
    assert (numbers["uncaptioned"], numbers["num_captions"]) == (["s0000001"], 3)
    summary = (out / "summary.md").read_text()
    assert "- images without a caption, which count as not found: 1 (s0000001, ...)" in summary

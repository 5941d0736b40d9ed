"""Nearest neighbours and linear probe: by hand, against scikit-learn, and as a command."""

import csv
import json
import math
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ds_linclip.config import ModelConfig, TextTower, VisionTower
from ds_linclip.data import UnreadableImage
from ds_linclip.data.prepare.digits import CLASSNAMES, TEMPLATES, digit_samples
from ds_linclip.data.prepare.shard_writer import RawSample, write_labelled_folder
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.features import Features
from linclip_eval.probe import Accuracy, knn, linear_probe
from linclip_launch.cli import main


def features_of(
    images: np.ndarray, labels: Iterable[int], unreadable_labels: Iterable[int] = ()
) -> Features:
    images = np.asarray(images, np.float32)
    lost = np.array(list(unreadable_labels), np.int64)
    return Features(
        images=images / np.linalg.norm(images, axis=1, keepdims=True),
        labels=np.array(list(labels), np.int64),
        keys=tuple(f"s{i}" for i in range(len(images))),
        texts=np.empty((0, 0), np.float32),
        captions=(),
        owners=np.empty(0, np.int64),
        unreadable=tuple(
            UnreadableImage(f"u{i}", "image_undecodable", f"sample u{i}") for i in range(len(lost))
        ),
        unreadable_labels=lost,
    )


def clusters(num_images: int, num_classes: int, noise: float, seed: int) -> Features:
    """Return features around a centre per class; the centres are the same for every seed."""
    centres = np.random.default_rng(7).normal(size=(num_classes, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_images)
    images = centres[labels] + noise * rng.normal(size=(num_images, 12))
    return features_of(images, labels)


def at_angles(degrees: Iterable[float], labels: Iterable[int], **options: object) -> Features:
    angles = np.radians(list(degrees))
    return features_of(np.stack([np.cos(angles), np.sin(angles)], axis=1), labels, **options)


def test_votes_by_hand():
    train = at_angles([0, 20, 22, 60, 180], [0, 1, 1, 2, 3])
    test = at_angles([9], [0])
    result = knn(train, test, num_neighbors=[1, 3, 4], device="cpu")
    votes = [math.exp(math.cos(math.radians(angle)) / 0.07) for angle in (9, 11, 13)]
    assert votes[0] > max(votes[1:])  # one neighbour votes for 0
    assert votes[1] + votes[2] > votes[0]  # three vote for 1
    assert {k: of.ranks.tolist() for k, of in result.items()} == {1: [1], 3: [2], 4: [2]}


def test_class_without_votes_is_never_predicted():
    train = at_angles([0, 5, 90], [0, 0, 1])
    result = knn(train, at_angles([2, 88], [1, 5]), num_neighbors=[2], device="cpu")
    assert (result[2].ranks > 5).all()
    assert result[2].topk(5) == 0


def test_ties_go_to_the_earlier_image_and_the_lower_class():
    train, test = at_angles([30] * 4, [3, 1, 1, 2]), at_angles([31] * 3, [1, 2, 3])
    result = knn(train, test, num_neighbors=[1, 2, 4], device="cpu")
    ranks = {k: of.ranks.tolist() for k, of in result.items()}
    assert ranks == {1: [5, 5, 1], 2: [1, 5, 2], 4: [1, 2, 3]}


@pytest.mark.parametrize("k", [1, 5, 20])
def test_nearest_neighbours_agree_with_scikit_learn(k):
    train, test = clusters(300, 6, 2.0, 0), clusters(120, 6, 2.0, 1)
    model = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train.images, train.labels)
    expected = (model.predict(test.images) == test.labels).mean()
    result = knn(train, test, num_neighbors=[k, 30], device="cpu")
    assert result[k].topk(1) == expected
    assert 0.3 < expected < 0.95


def test_probe_is_a_logistic_regression_with_the_chosen_strength():
    train, test = clusters(200, 4, 2.5, 0), clusters(150, 4, 2.5, 1)
    result = linear_probe(train, test)
    model = LogisticRegression(C=1 / result.strength, max_iter=1000)
    model.fit(train.images.astype(float), train.labels)
    logits = model.decision_function(test.images.astype(float))
    order = np.argsort(-logits, axis=1)
    expected = 1 + np.argmax(order == test.labels[:, None], axis=1)
    assert np.array_equal(result.accuracy.ranks, expected)
    assert 0.3 < result.accuracy.topk(1) < 0.95


def test_strength_is_searched_as_in_the_paper():
    result = linear_probe(clusters(200, 4, 2.5, 0), clusters(20, 4, 2.5, 1))
    steps = [8 * (math.log10(fit.strength) + 6) for fit in result.search]
    assert steps == pytest.approx([round(step) for step in steps], abs=1e-9)
    steps = [round(step) for step in steps]
    assert {0, 16, 32, 48, 64, 80, 96} <= set(steps)
    assert steps == sorted(steps)
    best = max(fit.validation_top1 for fit in result.search)
    chosen = [fit.strength for fit in result.search if fit.validation_top1 == best]
    assert result.strength == max(chosen)
    near = round(8 * (math.log10(result.strength) + 6))
    assert {near - 1, near + 1} - {-1, 97} <= set(steps)
    assert result.converged
    assert result.num_unconverged == sum(not fit.converged for fit in result.search)


def test_fit_that_reaches_the_limit_of_iterations_is_counted():
    # Only a direction that hardly varies separates the classes. Ten iterations are far too few
    # without a penalty; with a strong one, three or four suffice, depending on rounding.
    images = np.random.default_rng(0).normal(size=(400, 40)) * np.geomspace(1, 1e-4, 40)
    labels = (images[:, -1] > 0).astype(int)
    train, test = features_of(images, labels), features_of(images[:50], labels[:50])
    result = linear_probe(train, test, max_iterations=10)
    weakest, strongest = result.search[0], result.search[-1]
    assert (weakest.converged, weakest.num_iterations) == (False, 10)
    assert strongest.converged
    assert result.num_unconverged == sum(not fit.converged for fit in result.search) + (
        not result.converged
    )


def test_two_classes_and_labels_with_gaps():
    train = at_angles([0, 10, 20, 90, 80, 70] * 4, [2, 2, 2, 6, 6, 6] * 4)
    test = at_angles([5, 85, 5, 85], [2, 6, 6, 2])
    result = linear_probe(train, test)
    assert result.accuracy.ranks.tolist() == [1, 1, 2, 2]
    unknown = linear_probe(train, at_angles([5, 85], [4, 9]))
    assert unknown.accuracy.topk(5) == 0


def test_unreadable_test_images_count_as_wrong():
    train = clusters(100, 3, 0.1, 0)
    test = features_of(train.images[:4], train.labels[:4], unreadable_labels=[2])
    for accuracy in (
        knn(train, test, num_neighbors=[5], device="cpu")[5],
        linear_probe(train, test).accuracy,
    ):
        assert (accuracy.num_samples, accuracy.topk(1), accuracy.topk(5)) == (5, 0.8, 0.8)


def test_mean_per_class_recall_by_hand():
    accuracy = Accuracy(labels=np.array([0, 0, 0, 2]), ranks=np.array([1, 1, 2, 1]))
    assert accuracy.topk(1) == 0.75
    assert accuracy.mean_per_class_recall == pytest.approx((2 / 3 + 1) / 2)


def test_bad_input_is_refused():
    train, test = clusters(20, 3, 1.0, 0), clusters(10, 3, 1.0, 1)
    for k in (0, 21):
        with pytest.raises(ValueError, match=rf"num_neighbors \({k}\) must be in \[1, 20\]"):
            knn(train, test, num_neighbors=[5, k], device="cpu")
    with pytest.raises(ValueError, match=r"training images \(5\) must be of two classes or more"):
        linear_probe(at_angles(range(5), [1] * 5), test)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder with random weights."""
    config = ModelConfig(
        embed_dim=24,
        vision=VisionTower(image_size=(16, 16), patch_size=4, width=32, layers=1, head_width=16),
        text=TextTower(context_length=8, width=32, layers=1, heads=2),
    )
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    mesh = Mesh.create()
    export_folder(CLIP(config, mesh), folder)
    mesh.close()
    return folder


def write_digits(folder: Path, samples: Iterable[RawSample], classnames: list[str]) -> None:
    write_labelled_folder(folder, samples, classnames=classnames, templates=TEMPLATES)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the digits in ``train`` and ``test``."""
    folder = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 250), ("test", 80)):
        samples = islice(digit_samples(split, image_size=16, seed=0), count)
        write_digits(folder / split, samples, CLASSNAMES)
    return folder


@pytest.mark.long
def test_command_writes_numbers_summary_search_and_figure(model_folder, sets, tmp_path):
    out = tmp_path / "out"
    words = [
        "eval",
        "probe",
        str(model_folder),
        "--train",
        str(sets / "train"),
        "--test",
        str(sets / "test"),
    ]
    words += ["--out", str(out), "--num-workers", "0", "--num-neighbors", "1", "20"]
    assert main(words) == 0
    numbers = json.loads((out / "results.json").read_text())
    assert (numbers["num_train"], numbers["num_test"]) == (250, 80)
    assert numbers["knn"].keys() == {"1", "20"}
    for scores in (*numbers["knn"].values(), numbers["linear_probe"]):
        assert 0.25 < scores["top1"] <= scores["top5"] <= 1  # random features of digits
        low, high = scores["top1_interval"]
        assert low < scores["top1"] < high
        assert 0.2 < scores["mean_per_class_recall"] < 1
    probe = numbers["linear_probe"]
    assert probe["strength"] in [fit["strength"] for fit in probe["search"]]
    with (out / "search.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(probe["search"])
    summary = (out / "summary.md").read_text()
    assert "learned from 250 images, scored on 80" in summary
    assert "| linear probe |" in summary
    assert "| 20 nearest neighbours |" in summary
    assert ("did not converge" in summary) == (probe["num_unconverged"] > 0)
    with Image.open(out / "search.png") as picture:
        assert min(picture.size) > 300


def test_sets_of_other_classes_are_refused(model_folder, sets, tmp_path, capsys):
    samples = islice(digit_samples("test", image_size=16, seed=0), 3)
    write_digits(tmp_path / "test", samples, CLASSNAMES[::-1])
    words = [
        "eval",
        "probe",
        str(model_folder),
        "--train",
        str(sets / "train"),
        "--test",
        str(tmp_path / "test"),
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"classes of --test \(.*\) must be those of --train", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()

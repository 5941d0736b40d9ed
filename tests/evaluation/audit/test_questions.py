"""Questions to models that look at a known part of their input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_eval.audit.estimate import estimate
from linclip_eval.audit.questions import (
    Audited,
    ask_match,
    ask_parts,
    centre_and_surroundings,
    parts_encoder,
    split_parts,
)
from linclip_eval.features import Features

NUM = 1200


def features_of(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> Features:
    """Return features with a caption for each image, scaled to length 1."""
    images, texts = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        for rows in (images, texts)
    )
    return Features(
        images=images,
        labels=labels,
        keys=tuple(f"s{i}" for i in range(len(images))),
        texts=texts,
        captions=tuple(f"caption {i}" for i in range(len(images))),
        owners=np.arange(len(images)),
        unreadable=(),
        unreadable_labels=np.empty(0, np.int64),
    )


def parts_of(audited: Audited) -> dict[str, float]:
    return {e.part: e.bits for e in estimate(audited.samples, num_repeats=20, seed=0)[0]}


def matched(features: Features, **options: int) -> Audited:
    return ask_match(features, **{"num_bins": 3, "seed": 0, **options}, device="cpu")


def three_topics() -> tuple[np.ndarray, np.ndarray]:
    """Return topics and features around a direction for each of them."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM) % 3
    return labels, np.eye(3)[labels] + 0.05 * rng.normal(size=(NUM, 3))


def test_a_model_that_matches_topics_is_synergistic():
    labels, centres = three_topics()
    audited = matched(features_of(centres, centres[np.roll(np.arange(NUM), 3)], labels))
    assert audited.right.mean() > 0.99
    parts = parts_of(audited)
    assert parts["synergistic"] == pytest.approx(parts["total"], abs=0.02)
    assert parts["total"] > 0.9


def test_a_model_that_looks_only_at_the_image_has_information_unique_to_it():
    """The cosine to any caption depends on the image's angle to the axis of all captions."""
    labels, centres = three_topics()
    angles = np.array([0.2, 0.5, 0.9, 1.3])[np.arange(NUM) // 300]
    rng = np.random.default_rng(1)
    images = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    images += 0.01 * rng.normal(size=(NUM, 3))
    texts = np.array([1.0, 0, 0]) + 0.02 * centres
    parts = parts_of(matched(features_of(images, texts, labels), num_bins=4))
    assert parts["total"] == pytest.approx(1, abs=0.02)
    assert parts["unique_1"] == pytest.approx(parts["total"], abs=0.03)
    exchanged = parts_of(matched(features_of(texts, images, labels), num_bins=4))
    assert exchanged["unique_2"] == pytest.approx(exchanged["total"], abs=0.03)


def test_own_and_foreign_captions_are_balanced():
    labels, centres = three_topics()
    features = features_of(centres, centres, labels)
    # Two captions for each image, the second of which has the text of the next topic's first.
    texts = [f"topic {label}" for label in labels]
    features = replace(
        features,
        texts=np.repeat(features.texts, 2, axis=0),
        captions=tuple(text for t in zip(texts, texts, strict=True) for text in t),
        owners=np.repeat(np.arange(NUM), 2),
    )
    audited = matched(features)
    samples = audited.samples
    own, foreign = samples.second[:NUM], samples.second[NUM:]
    assert (np.bincount(own) == np.bincount(foreign)).all()
    assert (own != foreign).all()  # the three clusters of captions are the topics
    assert (samples.units == np.tile(np.arange(NUM), 2)).all()
    assert audited.right.all()
    assert np.bincount(samples.outcomes).tolist() == [NUM, NUM]


def test_match_refuses_captions_that_fit_every_image():
    labels, centres = three_topics()
    features = features_of(centres, centres, labels)
    with pytest.raises(ValueError, match=r"captions of the data \(1200 images\) must leave a for"):
        matched(replace(features, captions=("the same",) * NUM))
    with pytest.raises(ValueError, match=r"image s7 must have a caption; 1 of 1200 have none"):
        matched(replace(features, owners=np.where(features.owners == 7, 6, features.owners)))
    with pytest.raises(ValueError, match=r"--bins \(6\) must leave .* are 2400: take --bins 4"):
        matched(features, num_bins=6)


def coloured_images() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return images whose centre and surroundings have independent colours, red or green."""
    inner, outer = np.random.default_rng(0).integers(2, size=(2, 800))
    images = torch.zeros(800, 3, 8, 8)
    images[np.arange(800), outer] = 1
    images[:, :, 1:7, 1:7] = 0
    images[np.arange(800), inner, 1:7, 1:7] = 1
    return images + 0.01 * torch.randn(images.shape, generator=torch.manual_seed(0)), inner, outer


def asked(images: Tensor, window: slice, labels: np.ndarray, **options: int) -> Audited:
    """Ask a model that sees the mean colour of a square window."""

    def encode_image(images: Tensor) -> Tensor:
        return images[:, :, window, window].mean(dim=(2, 3))

    rows = parts_encoder(encode_image, 9 / 16)(images).numpy()  # the inner 6 x 6 of 8 x 8 pixels
    parts = split_parts(features_of(rows, rows, labels))
    arguments = {"num_bins": 2, "num_groups": None, "seed": 0, **options}
    return ask_parts(parts, torch.eye(3)[:, :2], ["red", "green"], **arguments)


def test_a_model_that_sees_the_centre_has_information_unique_to_it():
    images, inner, _ = coloured_images()
    audited = asked(images, slice(3, 5), inner)
    assert audited.right.all()
    parts = parts_of(audited)
    assert parts["unique_1"] == pytest.approx(1, abs=0.02)
    assert parts["total"] == pytest.approx(1, abs=0.02)


def test_a_model_that_sees_a_corner_has_information_unique_to_the_surroundings():
    images, _, outer = coloured_images()
    audited = asked(images, slice(0, 1), outer)
    assert audited.right.all()
    assert parts_of(audited)["unique_2"] == pytest.approx(1, abs=0.02)


def test_centre_is_cut_out_and_leaves_nothing_in_the_surroundings():
    images = torch.arange(2 * 3 * 6 * 8.0).reshape(2, 3, 6, 8)
    centre, rest = centre_and_surroundings(images, 0.25)  # 3 x 4 pixels
    assert centre.shape == rest.shape == images.shape
    changed = images.clone()
    changed[:, :, 1:4, 2:6] = -7
    same_rest = centre_and_surroundings(changed, 0.25)[1]
    assert torch.equal(rest, same_rest)
    outside = torch.ones(6, 8, dtype=torch.bool)
    outside[1:4, 2:6] = False
    assert torch.equal(rest[..., outside], images[..., outside])
    means = images[..., outside].mean(dim=-1)
    torch.testing.assert_close(rest[:, :, 2, 3], means)
    changed = images.clone()
    changed[..., outside] = -7
    torch.testing.assert_close(centre_and_surroundings(changed, 0.25)[0], centre)


def test_classes_are_joined_to_groups_by_their_texts():
    classifier = torch.tensor([[1.0, 0.99, 0, 0.1], [0, 0.1, 1, 0.99]])
    classifier = F.normalize(classifier, dim=0)
    rng = np.random.default_rng(0)
    labels = np.arange(NUM) % 4
    images = classifier.T.numpy()[labels] + 0.001 * rng.normal(size=(NUM, 2))
    parts = [features_of(images, images, labels)] * 3
    names = ["cat", "lion", "car", "bus"]
    audited = ask_parts(parts, classifier, names, num_bins=2, num_groups=2, seed=0)
    assert sorted(audited.outcomes) == ["car, bus", "cat, lion"]
    assert audited.outcomes[audited.samples.outcomes[0]] == "cat, lion"
    assert len({*audited.samples.outcomes[::4], *audited.samples.outcomes[1::4]}) == 1
    assert audited.right.all()

"""The questions of an audit: which decision of a model, from which two sources.

- match: does the model say that an image and a caption belong together; sources: image, caption.
- parts: which class does the model give to an image; sources: its centre, and what is around it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ds_linclip.data import clean_text
from linclip_eval.audit.estimate import Binned, check_samples, cluster
from linclip_eval.features import Features, similarities
from linclip_eval.protocols import Encoder

__all__ = ["Audited", "ask_match", "ask_parts", "captioned", "parts_encoder", "split_parts"]

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

_MAX_PASSES = 100
_PARTS = ("whole", "centre", "surroundings")


@dataclass(frozen=True, kw_only=True)
class Audited:
    """The decisions of a model with their sources.

    Attributes:
        samples: Decisions and bins.
        outcomes: A name for each number of an outcome.
        keys: [N] the key of the image of each sample.
        right: [N] whether the decision is the true one.
        threshold: The cosine above which a pair matches; None: another question.
    """

    samples: Binned
    outcomes: Sequence[str]
    keys: Sequence[str]
    right: NDArray[np.bool_]
    threshold: float | None = None


def ask_match(
    features: Features, *, num_bins: int, device: torch.device | str, seed: int
) -> Audited:
    """Ask a model of every image whether it belongs to its own caption, and to a foreign one.

    An image's own caption is one of its captions, drawn at random; the foreign one is that of
    another image, of another class where there are several classes, and with a text that the image
    does not have. Every caption is used once as the own and once as a foreign one. The model says
    yes where the cosine exceeds the median of all pairs.

    Args:
        features: Features of images and captions; every image has a caption.
        num_bins: The number of clusters of the images, and that of the captions.
        device: The device that computes cosines.
        seed: The seed of pairs and clusters.

    Raises:
        ValueError: for too few images, or captions that are too few or too similar.
    """
    num_images = len(features.images)
    check_samples(2 * num_images, num_bins, 2)
    rng = np.random.default_rng(seed)
    own = _one_caption_each(features, rng)  # [N] rows of features.texts
    foreign = _foreign_captions(features, own, rng)
    texts = features.texts[own]
    images = np.tile(np.arange(num_images), 2)
    captions = np.concatenate([np.arange(num_images), foreign])  # rows of texts
    cosines = _cosines(features.images, texts, images, captions, device)
    threshold = float(np.median(cosines))
    yes = cosines > threshold
    samples = Binned(
        outcomes=yes.astype(np.int64),
        first=cluster(features.images, num_bins, what="images", seed=seed)[images],
        second=cluster(texts, num_bins, what="captions", seed=seed)[captions],
        units=images,
    )
    return Audited(
        samples=samples,
        outcomes=("no", "yes"),
        keys=[features.keys[image] for image in images],
        right=yes == (np.arange(2 * num_images) < num_images),
        threshold=threshold,
    )


def captioned(features: Features) -> Features:
    """Return the features of the images that have a caption."""
    kept, owners = np.unique(features.owners, return_inverse=True)
    return replace(
        features,
        images=features.images[kept],
        labels=features.labels[kept],
        keys=tuple(features.keys[image] for image in kept),
        owners=owners,
    )


def ask_parts(
    parts: Sequence[Features],
    classifier: Tensor,
    names: Sequence[str],
    *,
    num_bins: int,
    num_groups: int | None,
    seed: int,
) -> Audited:
    """Ask a model for the class of every image, with its centre and its surroundings as sources.

    Args:
        parts: Features of whole images, their centres and their surroundings, see
            :func:`split_parts`.
        classifier: [E, C] text features of C classes.
        names: The names of the classes.
        num_bins: The number of clusters of the centres, and that of the surroundings.
        num_groups: The number of groups that classes are joined to, by k-means of their text
            features; None: every class is an outcome by itself.
        seed: The seed of clusters and groups.

    Raises:
        ValueError: for too few images.
    """
    whole, centre, surroundings = parts
    groups = _class_groups(classifier, num_groups, seed)
    check_samples(len(whole.images), num_bins, int(groups.max()) + 1)
    columns = np.ascontiguousarray(classifier.T.cpu().numpy())
    decided = np.concatenate(
        [
            cosines.argmax(dim=1).cpu().numpy()
            for _, cosines in similarities(whole.images, columns, device=classifier.device)
        ]
    )
    outcomes = [
        ", ".join(names[label] for label in np.flatnonzero(groups == group))
        for group in range(int(groups.max()) + 1)
    ]
    return Audited(
        samples=Binned(
            outcomes=groups[decided],
            first=cluster(centre.images, num_bins, what="centres", seed=seed),
            second=cluster(surroundings.images, num_bins, what="surroundings", seed=seed),
            units=np.arange(len(decided)),
        ),
        outcomes=outcomes,
        keys=whole.keys,
        right=decided == whole.labels,
    )


def _class_groups(classifier: Tensor, num_groups: int | None, seed: int) -> Numbers:
    """Return the group [C] of every class."""
    columns = np.ascontiguousarray(classifier.T.cpu().numpy())
    if num_groups is None:
        return np.arange(len(columns))
    return cluster(columns, num_groups, what="classes", seed=seed)


def parts_encoder(encode_image: Encoder, centre_share: float) -> Callable[[Tensor], Tensor]:
    """Return an encoder of whole images, their centres and their surroundings.

    The centre is a crop with the sides' ratio, resized to the size of the image. The surroundings
    are the image with the mean colour of what is around the crop in its place, so that nothing of
    the crop is left.

    Args:
        encode_image: Maps images [B, 3, H, W] to features [B, E].
        centre_share: The share of the image's area that is its centre.

    Returns:
        A function from images [B, 3, H, W] to features [B, 3E], each third of length 1.
    """

    def encode(images: Tensor) -> Tensor:
        views = (images, *centre_and_surroundings(images, centre_share))
        return torch.cat([F.normalize(encode_image(view).float(), dim=-1) for view in views], dim=1)

    return encode


def centre_and_surroundings(images: Tensor, centre_share: float) -> tuple[Tensor, Tensor]:
    """Return the central crop and the rest of images, both [B, 3, H, W]."""
    height, width = images.shape[-2:]
    rows, columns = (_middle(side, centre_share) for side in (height, width))
    crop = images[..., rows, columns]
    hole = images.new_zeros(height, width)
    hole[rows, columns] = 1
    colours = (images * (1 - hole)).sum(dim=(2, 3)) / (1 - hole).sum()  # [B, 3]
    rest = torch.where(hole > 0, colours[..., None, None], images)
    resized = F.interpolate(crop, (height, width), mode="bicubic", antialias=True)
    return resized, rest


def split_parts(features: Features) -> list[Features]:
    """Return the features of each part from those of :func:`parts_encoder`."""
    rows = features.images.reshape(len(features.images), len(_PARTS), -1)
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    parts = rows / np.where(lengths > 0, lengths, 1)
    return [replace(features, images=parts[:, i].copy()) for i in range(len(_PARTS))]


def _middle(side: int, share: float) -> slice:
    """Return the middle of a side; at least one pixel of it, and all but one at most."""
    length = min(max(1, round(side * math.sqrt(share))), side - 1)
    start = (side - length) // 2
    return slice(start, start + length)


def _one_caption_each(features: Features, rng: np.random.Generator) -> Numbers:
    """Return a row of the texts for each image, drawn among its captions."""
    if missing := features.uncaptioned:
        raise ValueError(
            f"image {missing[0]} must have a caption; {len(missing)} of {len(features.images)} "
            "have none"
        )
    order = rng.permutation(len(features.owners))
    _, first = np.unique(features.owners[order], return_index=True)
    return order[first]


def _foreign_captions(features: Features, own: Numbers, rng: np.random.Generator) -> Numbers:
    """Return, for each image, the number of the image whose caption is foreign to it."""
    texts = [clean_text(caption) for caption in features.captions]
    theirs: list[set[str]] = [set() for _ in own]
    for text, owner in zip(texts, features.owners.tolist(), strict=True):
        theirs[owner].add(text)
    labels = features.labels
    has_classes = len(np.unique(labels)) > 1

    def fits(image: int, other: int) -> bool:
        differs = not has_classes or labels[image] != labels[other]
        return bool(differs) and texts[own[other]] not in theirs[image]

    foreign = rng.permutation(len(own))
    for _ in range(_MAX_PASSES):
        wrong = [image for image, other in enumerate(foreign) if not fits(image, other)]
        if not wrong:
            return foreign
        for image, other in zip(wrong, rng.integers(len(own), size=len(wrong)), strict=True):
            foreign[[image, other]] = foreign[[other, image]]
    raise ValueError(
        f"the captions of the data ({len(own)} images) must leave a foreign one for every image, "
        f"of another class and with another text; {len(wrong)} images have none: take data with "
        "more captions"
    )


def _cosines(
    images: Floats, texts: Floats, rows: Numbers, columns: Numbers, device: torch.device | str
) -> NDArray[np.float64]:
    """Return the cosines of pairs of images[rows] and texts[columns]."""
    found = np.empty(len(rows))
    step = 4096
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        left, right = (
            torch.from_numpy(features[index[part]]).to(device, torch.float64)
            for features, index in ((images, rows), (texts, columns))
        )
        found[part] = (left * right).sum(dim=1).cpu().numpy()
    return found

"""Zero-shot classification, counted exactly and over any number of data-parallel ranks.

Prompts and classifier come from open_clip (its templates mechanism and its
``build_zero_shot_classifier``), logits are ``100 * image_features @ classifier`` as in
``open_clip_train.zero_shot``. Ranks may hold different numbers of samples, also none: they meet
only once the last of them has read its share.
"""

import csv
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import build_zero_shot_classifier
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = [
    "Prediction",
    "ZeroShotResult",
    "build_classifier",
    "parse_template",
    "write_per_class_csv",
    "zero_shot",
]

logger = logging.getLogger(__name__)

Encoder = Callable[[Tensor], Tensor]
Template = str | Callable[[str], str]


class LabelledBatch(Protocol):
    """What an evaluator reads of a batch."""

    @property
    def images(self) -> Tensor: ...  # [B, 3, H, W], normalised

    @property
    def labels(self) -> Tensor: ...  # [B], int64

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def captions(self) -> Sequence[str]: ...


@dataclass(kw_only=True, frozen=True)
class Prediction:
    """One classified image, for display."""

    key: str
    caption: str
    #: [3, H, W] on the CPU, normalised as the model saw it.
    image: Tensor
    true_class: str
    #: The five likeliest classes (or all, where there are fewer), likeliest first.
    top_classes: tuple[str, ...]
    top_probabilities: tuple[float, ...]


@dataclass(kw_only=True, frozen=True)
class ZeroShotResult:
    """Counts over the samples of all ranks; every score is a quotient of them.

    The counts are int64 tensors [C] on the CPU, in the order of ``classnames``.
    """

    classnames: tuple[str, ...]
    class_samples: Tensor
    #: Samples whose true class is the likeliest.
    class_top1: Tensor
    #: Samples whose true class is among the five likeliest.
    class_top5: Tensor
    #: Samples with a NaN or infinite logit; they count as wrong.
    num_nonfinite: int
    #: The first samples of this rank.
    predictions: tuple[Prediction, ...]

    @property
    def num_samples(self) -> int:
        return int(self.class_samples.sum())

    @property
    def top1(self) -> float:
        return int(self.class_top1.sum()) / self.num_samples

    @property
    def top5(self) -> float:
        """With five classes or fewer every finite sample counts: 1.0 says nothing then."""
        return int(self.class_top5.sum()) / self.num_samples

    @property
    def mean_per_class_recall(self) -> float:
        """Mean top-1 accuracy of the classes that have samples, each with the same weight."""
        seen = self.class_samples > 0
        return (self.class_top1[seen] / self.class_samples[seen].double()).mean().item()


def parse_template(template: Template) -> Callable[[str], str]:
    """A prompt template as a function of the class name.

    Args:
        template: format string with ``{}`` (open_clip) or ``{c}`` (clip_benchmark) for the name;
            callables are returned as they are.

    Raises:
        ValueError: for a string that is no format string, or has no place for the name.
    """
    if callable(template):
        return template
    text = template
    probe = "name"
    try:
        has_place = text.format(probe, c=probe) != text.format("", c="")
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"template ({text!r}) must be a format string: {error}") from error
    if not has_place:
        raise ValueError(f"template ({text!r}) must hold {{}} or {{c}} for the class name")
    return lambda name: text.format(name, c=name)


def build_classifier(
    encode_text: Encoder,
    classnames: Sequence[str],
    templates: Sequence[Template],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    group: ProcessGroup | None = None,
    classes_per_batch: int = 10,
) -> Tensor:
    """Embed every class as the mean of its prompts.

    Args:
        encode_text: token ids [B, L] to text features [B, E], normalised or not. With ``group`` it
            must not itself communicate over that group.
        classnames: C names; the index of a name is its label.
        templates: see :func:`parse_template`.
        tokenizer: prompts to token ids [B, L].
        device: where token ids go and the result lies.
        group: ranks among which the classes are split; each of them gets the whole result.
        classes_per_batch: classes embedded in one forward, times ``len(templates)`` prompts.

    Returns:
        Classifier [E, C], float32, columns of length 1.

    Raises:
        ValueError: for no class, no template, or a template without a place for the name.
    """
    if not classnames:
        raise ValueError("classnames ([]) must hold at least one class")
    if not templates:
        raise ValueError("templates ([]) must hold at least one template")
    if classes_per_batch < 1:
        raise ValueError(f"classes_per_batch ({classes_per_batch}) must be at least 1")

    def encode(texts: Tensor, normalize: bool) -> Tensor:
        features = encode_text(texts).float()
        return F.normalize(features, dim=-1) if normalize else features

    def embed(names: Sequence[str]) -> Tensor:
        return build_zero_shot_classifier(
            SimpleNamespace(encode_text=encode),
            tokenizer=tokenizer,
            classnames=names,
            templates=[parse_template(template) for template in templates],
            num_classes_per_batch=classes_per_batch,
            device=device,
        )

    if group is None:
        return embed(classnames)
    # Every rank embeds the same number of whole batches, so that no rank is without a shape to
    # gather; the names wrap around to fill the last ones, and the surplus is cut off.
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    num_batches = -(-len(classnames) // (classes_per_batch * world_size))
    share = num_batches * classes_per_batch
    names = [classnames[i % len(classnames)] for i in range(rank * share, (rank + 1) * share)]
    part = embed(names).T.contiguous()  # [share, E]
    parts = [torch.empty_like(part) for _ in range(world_size)]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts)[: len(classnames)].T.contiguous()  # [E, C]


def zero_shot(
    encode_image: Encoder,
    classifier: Tensor,
    batches: Iterable[LabelledBatch],
    *,
    classnames: Sequence[str],
    group: ProcessGroup | None = None,
    num_predictions: int = 0,
) -> ZeroShotResult:
    """Score images against a zero-shot classifier.

    A sample is right at k if fewer than k classes score higher than its own; of equal scores the
    lower label goes first, so that the count depends on no device's sorting. Training or evaluation
    mode and autocast are the business of whoever passes ``encode_image``.

    Args:
        encode_image: images [B, 3, H, W] to image features [B, E], normalised or not. With
            ``group`` it must not itself communicate over that group.
        classifier: [E, C] from :func:`build_classifier`.
        batches: this rank's share of the samples; a ValueError raised while iterating over them
            ends the call on all ranks of ``group``.
        classnames: the C names behind the columns of ``classifier``.
        group: the data-parallel ranks over which samples are counted, each sample on one of them.
        num_predictions: how many of this rank's first samples to keep for display.

    Returns:
        Counts and scores over all ranks, the same on each but for ``predictions``.

    Raises:
        ValueError: for a label without a class, no samples at all, or a classifier of the wrong
            shape; with ``group``, on all of its ranks if on one.
    """
    num_classes = len(classnames)
    if not classnames:
        raise ValueError("classnames ([]) must hold at least one class")
    if classifier.ndim != 2 or classifier.shape[1] != num_classes:
        raise ValueError(
            f"classifier ({list(classifier.shape)}) must have one column for each of the "
            f"{num_classes} classnames"
        )
    if num_classes <= 5:
        logger.info("top-5 over %d classes counts every sample as right", num_classes)

    counts = torch.zeros(4, num_classes, dtype=torch.int64, device=classifier.device)
    predictions: list[Prediction] = []
    problem = None
    try:
        for batch in batches:
            if len(batch.labels) == 0:
                continue
            _check_labels(batch.labels, num_classes)
            logits = _logits(encode_image, classifier, batch.images)
            labels = batch.labels.to(classifier.device)
            counts.index_add_(1, labels, _outcomes(logits, labels))
            if len(predictions) < num_predictions:
                missing = num_predictions - len(predictions)
                predictions += _predictions(batch, logits[:missing], classnames)
    except ValueError as error:
        if group is None:
            raise
        problem = error
    if group is not None:
        _raise_together(problem, group)
        dist.all_reduce(counts, group=group)

    samples, top1, top5, nonfinite = counts.cpu()
    if samples.sum() == 0:
        raise ValueError("batches (0 samples) must hold at least one sample")
    if nonfinite.any():
        logger.warning(
            "%d of %d samples have non-finite logits and count as wrong",
            nonfinite.sum(),
            samples.sum(),
        )
    return ZeroShotResult(
        classnames=tuple(classnames),
        class_samples=samples,
        class_top1=top1,
        class_top5=top5,
        num_nonfinite=int(nonfinite.sum()),
        predictions=tuple(predictions),
    )


def write_per_class_csv(result: ZeroShotResult, path: str | Path) -> None:
    """Write one line per class: label, name, number of samples, top-1 and top-5 accuracy.

    The accuracies of a class without samples are left empty.
    """
    counts = zip(
        result.classnames,
        result.class_samples.tolist(),
        result.class_top1.tolist(),
        result.class_top5.tolist(),
        strict=True,
    )
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "class", "num_samples", "top1", "top5"])
        for label, (name, samples, top1, top5) in enumerate(counts):
            scores = [top1 / samples, top5 / samples] if samples else ["", ""]
            writer.writerow([label, name, samples, *scores])


def _check_labels(labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"label ({wrong}) must be in [0, {num_classes}), the number of classnames")


@torch.no_grad()
def _logits(encode_image: Encoder, classifier: Tensor, images: Tensor) -> Tensor:
    features = encode_image(images.to(classifier.device, non_blocking=True))
    return 100.0 * F.normalize(features.float(), dim=-1) @ classifier  # [B, C]


def _outcomes(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of ones and zeros [4, B]: a sample, right at 1, right at 5, not finite."""
    own_label = labels[:, None]
    own_score = logits.gather(1, own_label)  # [B, 1]
    label = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own_score) | ((logits == own_score) & (label < own_label))
    place = ahead.sum(dim=1)  # [B]
    finite = logits.isfinite().all(dim=1)
    return torch.stack(
        [torch.ones_like(finite), finite & (place < 1), finite & (place < 5), ~finite]
    ).long()


def _predictions(
    batch: LabelledBatch, logits: Tensor, classnames: Sequence[str]
) -> list[Prediction]:
    ranked = logits.softmax(dim=1).cpu().sort(dim=1, descending=True, stable=True)
    return [
        Prediction(
            key=batch.keys[i],
            caption=batch.captions[i],
            image=batch.images[i].cpu().clone(),
            true_class=classnames[int(batch.labels[i])],
            top_classes=tuple(classnames[label] for label in ranked.indices[i, :5].tolist()),
            top_probabilities=tuple(ranked.values[i, :5].tolist()),
        )
        for i in range(len(logits))
    ]


def _raise_together(problem: ValueError | None, group: ProcessGroup) -> None:
    """Raise on every rank of ``group`` if one has a problem, naming that rank."""
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, str(problem) if problem else None, group=group)
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"data-parallel rank {rank}: {message}") from problem

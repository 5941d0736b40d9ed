"""Zero-shot classification, counted exactly over any number of ranks, and resumable.

Logits are ``100 * image_features @ classifier`` as in ``open_clip_train.zero_shot``. Of every image
its likeliest classes are kept and nothing else, so that memory does not grow with images x classes;
every score is a quotient of counts over what was kept.
"""

import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from ds_linclip.process.consensus import agree
from linclip_eval.protocols import ImageBatch, ImageSet
from linclip_eval.zero_shot.class_lists import ClassList, is_ancestor

__all__ = ["Prediction", "ZeroShotResult", "likeliest", "write_per_class_csv", "zero_shot"]

logger = logging.getLogger(__name__)

_NUM_KEPT = 10
_BATCHES_PER_PART = 16
#: Instead of a class, for images that count as wrong.
_UNREADABLE, _NONFINITE = -1, -2


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
    """What every image was taken for, over all ranks.

    Attributes:
        classes: Of the labels.
        labels: [N] true classes, in the order of the data.
        top: [N, K] the likeliest classes, likeliest first; negative for an image that could not be
            read or has a logit that is NaN or infinite: it counts as wrong.
        predictions: The first images of this rank.
    """

    classes: ClassList
    labels: NDArray[np.int32]
    top: NDArray[np.int32]
    predictions: tuple[Prediction, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_unreadable(self) -> int:
        return int((self.top[:, 0] == _UNREADABLE).sum())

    @property
    def num_nonfinite(self) -> int:
        return int((self.top[:, 0] == _NONFINITE).sum())

    @property
    def class_samples(self) -> NDArray[np.int64]:
        """[C] images of every class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def class_hits(self, k: int) -> NDArray[np.int64]:
        """[C] images of every class whose class is among the k likeliest."""
        return np.bincount(self.labels[self._hits(k)], minlength=len(self.classes))

    def topk(self, k: int) -> float:
        """Share of the images whose class is among the k likeliest, k up to 10.

        With k classes or fewer every finite sample counts: 1.0 says nothing then.
        """
        return float(self._hits(k).mean())

    def merged_topk(self, k: int) -> float:
        """The same, where any class of the same texts as the true one counts as right."""
        first: dict[tuple[str, ...], int] = {}
        groups = np.array(
            [first.setdefault(texts, i) for i, texts in enumerate(self.classes.texts)]
        )
        top = self.top[:, :k]
        return float(((groups[top] == groups[self.labels, None]) & (top >= 0)).any(axis=1).mean())

    @property
    def mean_per_class_recall(self) -> float:
        """Mean top-1 accuracy of the classes that have samples, each with the same weight."""
        samples = self.class_samples
        seen = samples > 0
        return float((self.class_hits(1)[seen] / samples[seen]).mean())

    @property
    def hierarchical_top1(self) -> float | None:
        """Share of the images taken for their class or something above it in WordNet ("dog" for a
        beagle); None for classes that are no synsets."""
        if not self.classes.is_wordnet:
            return None
        ids, pairs = self.classes.ids, self._pairs()
        right = sum(n for (true, taken), n in pairs.items() if is_ancestor(ids[taken], ids[true]))
        return right / self.num_samples

    def confusions(self) -> list[tuple[int, int, int]]:
        """(true class, class it was taken for, number of images), most frequent first."""
        wrong = [(true, taken, n) for (true, taken), n in self._pairs().items() if true != taken]
        return sorted(wrong, key=lambda entry: (-entry[2], entry[0], entry[1]))

    def _hits(self, k: int) -> NDArray[np.bool_]:
        hits: NDArray[np.bool_] = (self.top[:, :k] == self.labels[:, None]).any(axis=1)
        return hits

    def _pairs(self) -> Counter[tuple[int, int]]:
        usable = self.top[:, 0] >= 0
        return Counter(zip(self.labels[usable].tolist(), self.top[usable, 0].tolist(), strict=True))


def zero_shot(
    encode_image: Callable[[Tensor], Tensor],
    classifier: Tensor,
    data: ImageSet,
    classes: ClassList,
    *,
    group: ProcessGroup | None = None,
    parts: Path | None = None,
    num_predictions: int = 0,
) -> ZeroShotResult:
    """Classify every image.

    Of equal scores the lower label goes first, so that a result depends on no device's sorting; a
    batch holds the same images however many ranks there are. Training or evaluation mode and
    autocast are the business of whoever passes ``encode_image``.

    Args:
        encode_image: images [B, 3, H, W] to image features [B, E], normalised or not. With
            ``group`` it must not itself communicate over that group.
        classifier: [E, C] from :func:`build_classifier`.
        data: the same on every rank.
        classes: the C classes behind the columns of ``classifier``.
        group: the ranks that share out the batches, each batch to one of them.
        parts: folder of this very evaluation (model, classifier, data and batch size), where what
            is done is kept: a call that was cut off goes on where it was. None: nothing is kept.
        num_predictions: how many of this rank's first samples to keep for display.

    Returns:
        The same on all ranks but for ``predictions``.

    Raises:
        ValueError: for a classifier of the wrong shape, no samples at all, or one that the data
            refuse; with ``group``, on all of its ranks if on one.
        OSError: when ``parts`` cannot be written; likewise.
    """
    if classifier.ndim != 2 or classifier.shape[1] != len(classes):
        raise ValueError(
            f"classifier ({list(classifier.shape)}) must have one column for each of the "
            f"{len(classes)} classes"
        )
    rank, world_size = (
        (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    )
    predictions: list[Prediction] = []

    def classify(batch: ImageBatch) -> _Ranked:
        _check_labels(batch, len(classes))
        logits = _logits(encode_image, classifier, batch.images)
        if missing := num_predictions - len(predictions):
            predictions.extend(_predictions(batch, logits[:missing], classes))
        return _Ranked.of(batch, logits)

    def rank_share() -> list[tuple[int, "_Ranked"]]:
        size = _BATCHES_PER_PART if parts else 1
        share = range(0, data.num_batches, size)[rank::world_size]
        spans = [range(start, min(start + size, data.num_batches)) for start in share]
        return list(_rank_parts(data, spans, classify, parts, quiet=rank > 0))

    share = agree(rank_share, group, errors=(ValueError, OSError))
    shares = [share]
    if group is not None:
        shares *= world_size
        dist.all_gather_object(shares, share, group=group)
    parts_of_all = sorted(chain.from_iterable(shares), key=itemgetter(0))
    ranked = _Ranked.joined([part for _, part in parts_of_all])
    if len(ranked.labels) == 0:
        raise ValueError("data (0 samples) must hold at least one sample")
    result = ZeroShotResult(
        classes=classes,
        labels=ranked.labels,
        top=ranked.top,
        predictions=tuple(predictions),
    )
    if rank == 0:
        _warn(result)
    return result


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Labels [B, k] of the highest ``logits`` [B, C], highest first, of equals the lower label."""
    scores, labels = logits.topk(k, dim=1)
    labels, order = labels.sort(dim=1)
    order = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    labels = labels.gather(1, order)
    # Where the k-th score comes more often, topk may have taken any of them.
    tied = (logits >= scores[:, -1:]).sum(dim=1) > k
    if tied.any():
        labels[tied] = logits[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return labels


def write_per_class_csv(result: ZeroShotResult, path: str | Path) -> None:
    """Write one line per class: label, id, name, samples, top-1/5/10 accuracy, and the other class
    that its images are most often taken for, with how many.

    The accuracies of a class without samples are left empty.
    """
    classes = result.classes
    most_confused: dict[int, tuple[str, int]] = {}
    for true, taken, count in result.confusions():
        most_confused.setdefault(true, (classes.ids[taken], count))
    hits = [result.class_hits(k).tolist() for k in (1, 5, 10)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("label", "class", "name", "num_samples", "top1", "top5", "top10"),
                *("most_confused_with", "num_confused"),
            ]
        )
        for label, samples in enumerate(result.class_samples.tolist()):
            scores = [of_k[label] / samples if samples else "" for of_k in hits]
            other, count = most_confused.get(label, ("", 0))
            row = [label, classes.ids[label], classes.title(label), samples, *scores, other, count]
            writer.writerow(row)


@dataclass(kw_only=True, frozen=True)
class _Ranked:
    """Labels [n] of some images and the classes [n, K] they were taken for."""

    labels: NDArray[np.int32]
    top: NDArray[np.int32]

    @classmethod
    def of(cls, batch: ImageBatch, logits: Tensor) -> "_Ranked":
        k = min(_NUM_KEPT, logits.shape[1])
        top = likeliest(logits, k)
        top[~logits.isfinite().all(dim=1)] = _NONFINITE
        unreadable = torch.full((len(batch.unreadable_labels), k), _UNREADABLE)
        return cls(
            labels=torch.cat([batch.labels, batch.unreadable_labels]).numpy().astype(np.int32),
            top=torch.cat([top.cpu(), unreadable]).numpy().astype(np.int32),
        )

    @classmethod
    def joined(cls, ranked: Sequence["_Ranked"]) -> "_Ranked":
        if not ranked:
            return cls(labels=np.empty(0, np.int32), top=np.empty((0, 1), np.int32))
        return cls(
            labels=np.concatenate([part.labels for part in ranked]),
            top=np.concatenate([part.top for part in ranked]),
        )

    @classmethod
    def load(cls, path: Path) -> "_Ranked | None":
        """What :meth:`save` wrote; None where it did not, or was cut off."""
        try:
            with np.load(path, allow_pickle=False) as content:
                return cls(labels=content["labels"], top=content["top"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{uuid4().hex}")
        with partial.open("wb") as file:
            np.savez(file, labels=self.labels, top=self.top)
        partial.replace(path)


def _rank_parts(
    data: ImageSet,
    spans: Sequence[range],
    classify: Callable[[ImageBatch], _Ranked],
    folder: Path | None,
    *,
    quiet: bool,
) -> Iterator[tuple[int, _Ranked]]:
    """First batch and content of every part, a span of batches; what is on disk is taken."""
    todo = []
    for span in spans:
        known = _Ranked.load(_part_file(folder, span)) if folder else None
        if known is None:
            todo.append(span)
        else:
            yield span.start, known
    numbers = list(chain.from_iterable(todo))
    batches = iter(
        tqdm(
            data.batches(numbers),
            desc="images",
            total=len(numbers),
            unit="batch",
            delay=5,
            leave=False,
            disable=quiet,
        )
    )
    for span in todo:
        part = _Ranked.joined([classify(batch) for batch in islice(batches, len(span))])
        if folder:
            part.save(_part_file(folder, span))
        yield span.start, part


def _part_file(folder: Path, span: range) -> Path:
    return folder / f"batches-{span.start:07d}-{span.stop:07d}.npz"


def _check_labels(batch: ImageBatch, num_classes: int) -> None:
    for label in chain(batch.labels.tolist(), batch.unreadable_labels.tolist()):
        if not 0 <= label < num_classes:
            raise ValueError(f"label ({label}) must be in [0, {num_classes}), the classes")


@torch.no_grad()
def _logits(encode_image: Callable[[Tensor], Tensor], classifier: Tensor, images: Tensor) -> Tensor:
    if len(images) == 0:
        return classifier.new_empty(0, classifier.shape[1])
    features = encode_image(images.to(classifier.device, non_blocking=True))
    return 100.0 * F.normalize(features.float(), dim=-1) @ classifier  # [B, C]


def _predictions(batch: ImageBatch, logits: Tensor, classes: ClassList) -> list[Prediction]:
    probabilities = logits.softmax(dim=1)
    top = likeliest(probabilities, min(5, len(classes)))
    return [
        Prediction(
            key=batch.keys[i],
            caption=batch.captions[i],
            image=batch.images[i].cpu().clone(),
            true_class=classes.title(int(batch.labels[i])),
            top_classes=tuple(classes.title(label) for label in top[i].tolist()),
            top_probabilities=tuple(probabilities[i, top[i]].tolist()),
        )
        for i in range(len(logits))
    ]


def _warn(result: ZeroShotResult) -> None:
    if len(result.classes) <= 5:
        logger.info("top-5 over %d classes counts every sample as right", len(result.classes))
    for count, what in (
        (result.num_nonfinite, "have non-finite logits"),
        (result.num_unreadable, "cannot be read"),
    ):
        if count:
            logger.warning("%d of %d images %s and count as wrong", count, result.num_samples, what)

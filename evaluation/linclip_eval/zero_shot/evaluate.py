"""Zero-shot classification, counted exactly over any number of ranks, and resumable.

Logits are ``100 * image_features @ classifier`` as in ``open_clip_train.zero_shot``. Only the ten
most likely classes of an image are kept, so that memory does not grow with images x classes; every
score is a ratio of counts over them.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_linclip.data import UnreadableImage, describe_unreadable
from ds_linclip.process.consensus import map_over_ranks
from linclip_eval.protocols import Encoder, ImageBatch, ImageSet, unit_features
from linclip_eval.zero_shot.class_lists import ClassList, ancestors, is_ancestor
from linclip_eval.zero_shot.tensor_files import load_tensors, save_tensors

__all__ = ["Prediction", "ZeroShotResult", "stable_topk", "zero_shot"]

logger = logging.getLogger(__name__)

_NUM_KEPT = 10
_BATCHES_PER_PART = 16
#: Takes the place of the predicted classes of an image that cannot be decoded.
_UNREADABLE = -1


@dataclass(kw_only=True, frozen=True)
class Prediction:
    """One classified image, for display.

    Attributes:
        caption: Its caption; empty when it has none.
        image: [3, H, W] on the CPU, normalised as the model saw it.
        true_class: The title of its class.
        top_classes: The titles of the five most likely classes (or of all), most likely first.
    """

    key: str
    caption: str
    image: Tensor
    true_class: str
    top_classes: tuple[str, ...]
    top_probabilities: tuple[float, ...]


@dataclass(kw_only=True, frozen=True)
class ZeroShotResult:
    """The predicted classes of every image, over all ranks.

    Attributes:
        classes: The C classes that the labels index.
        labels: [N] true classes, in the order of the data.
        top: [N, K] the most likely classes, most likely first. All K are negative for an image that
            could not be read: it counts as wrong.
        unreadable: The images that could not be read.
        predictions: The first images of this rank, for display.
    """

    classes: ClassList
    labels: NDArray[np.int32]
    top: NDArray[np.int32]
    unreadable: tuple[UnreadableImage, ...] = ()
    predictions: tuple[Prediction, ...] = ()

    @property
    def num_samples(self) -> int:
        """The number of images, unreadable ones included."""
        return len(self.labels)

    @property
    def class_samples(self) -> NDArray[np.int64]:
        """The number of images of each class, [C]."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def class_hits(self, k: int) -> NDArray[np.int64]:
        """Return, for each class [C], the images whose class is among their k most likely."""
        return np.bincount(self.labels[self._hits(k)], minlength=len(self.classes))

    def topk(self, k: int) -> float:
        """Return the share of images whose class is among their k most likely, k up to 10.

        With k classes or fewer, every image that can be read counts as right.
        """
        return float(self._hits(k).mean())

    def merged_topk(self, k: int) -> float:
        """Return top-k accuracy where any class with the texts of the true one counts as right."""
        first: dict[tuple[str, ...], int] = {}
        groups = np.array(
            [first.setdefault(texts, i) for i, texts in enumerate(self.classes.texts)]
        )
        top = self.top[:, :k]
        return float(((groups[top] == groups[self.labels, None]) & (top >= 0)).any(axis=1).mean())

    @property
    def mean_per_class_recall(self) -> float:
        """Top-1 accuracy averaged over the classes that have images, with equal weights."""
        samples = self.class_samples
        seen = samples > 0
        return float((self.class_hits(1)[seen] / samples[seen]).mean())

    @property
    def hierarchical_top1(self) -> float | None:
        """Top-1 accuracy where a WordNet ancestor of the class counts as right ("dog" for a
        beagle); None for classes that are not synsets."""
        if not self.classes.is_wordnet:
            return None
        ids, pairs = self.classes.ids, self._pairs()
        right = sum(n for (true, taken), n in pairs.items() if is_ancestor(ids[taken], ids[true]))
        return right / self.num_samples

    @property
    def best_constant_answer(self) -> tuple[int, float] | None:
        """The class that would have the best hierarchical top-1 as the answer to every image, and
        that accuracy; None for classes that are not synsets.

        A vague class is above many others: "organism" is right for half of ImageNet-22k's.
        """
        if not self.classes.is_wordnet:
            return None
        right: Counter[str] = Counter()
        for synset, samples in zip(self.classes.ids, self.class_samples.tolist(), strict=True):
            right.update(dict.fromkeys(ancestors(synset), samples))
        label = max(range(len(self.classes)), key=lambda each: right[self.classes.ids[each]])
        return label, right[self.classes.ids[label]] / self.num_samples

    def confusions(self) -> list[tuple[int, int, int]]:
        """Return (true class, predicted class, number of images), most frequent first."""
        wrong = [(true, taken, n) for (true, taken), n in self._pairs().items() if true != taken]
        return sorted(wrong, key=lambda entry: (-entry[2], entry[0], entry[1]))

    def _hits(self, k: int) -> NDArray[np.bool_]:
        hits: NDArray[np.bool_] = (self.top[:, :k] == self.labels[:, None]).any(axis=1)
        return hits

    def _pairs(self) -> Counter[tuple[int, int]]:
        usable = self.top[:, 0] >= 0
        return Counter(zip(self.labels[usable].tolist(), self.top[usable, 0].tolist(), strict=True))


class _Part(NamedTuple):
    """The result of some batches: a row [1 + K] of labels per image, and unreadable images."""

    rows: Tensor
    unreadable: tuple[UnreadableImage, ...]


def zero_shot(
    encode_image: Encoder,
    classifier: Tensor,
    data: ImageSet,
    classes: ClassList,
    *,
    group: ProcessGroup | None = None,
    parts_dir: Path | None = None,
    num_predictions: int = 0,
) -> ZeroShotResult:
    """Classify every image of a data set.

    Of equal logits the lower label comes first, so that no device's sorting order matters. The
    caller sets evaluation mode and autocast of ``encode_image``.

    Args:
        classifier: [E, C] from :func:`build_classifier`.
        data: The images, the same on every rank.
        classes: The C classes behind the columns of ``classifier``.
        parts_dir: A folder for finished parts, from which an interrupted call resumes. It must
            belong to this model, classifier, data and batch size. None: nothing is kept.
        num_predictions: The number of this rank's first images to keep for display.

    Returns:
        The same result on all ranks, except for ``predictions``.

    Raises:
        ValueError: for a classifier of the wrong shape or data without samples; on all ranks, for a
            label without a class, an image that the data set refuses, features that are not
            finite, or a part that cannot be written.
    """
    if classifier.ndim != 2 or classifier.shape[1] != len(classes):
        raise ValueError(
            f"classifier ({list(classifier.shape)}) must have one column for each of the "
            f"{len(classes)} classes"
        )
    if data.num_batches == 0:
        raise ValueError("data (0 samples) must hold at least one sample")
    predictions: list[Prediction] = []

    def classify(batch: ImageBatch) -> tuple[Tensor, Sequence[UnreadableImage]]:
        _check_labels(batch, len(classes))
        logits = _logits(encode_image, classifier, batch)
        if missing := num_predictions - len(predictions):
            predictions.extend(_predictions(batch, logits[:missing], classes))
        return _labels_and_top(batch, logits), batch.unreadable

    def classify_parts(spans: Sequence[range]) -> Iterator[_Part]:
        names = {span: f"batches-{span.start:07d}-{span.stop:07d}.safetensors" for span in spans}
        files = {span: parts_dir / names[span] for span in spans} if parts_dir else {}
        kept = {span: _load_part(file) for span, file in files.items()}
        batches = iter(data.batches([*chain(*(s for s in spans if kept.get(s) is None))]))
        for span in spans:
            part = kept.get(span)
            if part is None:
                rows, unreadable = zip(*map(classify, islice(batches, len(span))), strict=True)
                part = _Part(torch.cat(rows), tuple(chain(*unreadable)))
                if parts_dir:
                    _save_part(files[span], part)
            yield part

    size = _BATCHES_PER_PART if parts_dir else 1
    starts = range(0, data.num_batches, size)
    spans = [range(start, min(start + size, data.num_batches)) for start in starts]
    parts = map_over_ranks(classify_parts, spans, group, title="parts of the images")
    rows = torch.cat([part.rows for part in parts]).numpy()
    result = ZeroShotResult(
        classes=classes,
        labels=rows[:, 0],
        top=rows[:, 1:],
        unreadable=tuple(chain(*(part.unreadable for part in parts))),
        predictions=tuple(predictions),
    )
    if group is None or dist.get_rank(group) == 0:
        _log_uncounted(result)
    return result


def stable_topk(logits: Tensor, k: int) -> Tensor:
    """Return the labels [B, k] of the highest of ``logits`` [B, C], highest first.

    Of equal logits the lower label comes first, as in a stable sort; ``torch.topk`` promises none.
    """
    scores, labels = logits.topk(k, dim=1)
    labels, order = labels.sort(dim=1)
    order = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    labels = labels.gather(1, order)
    # Where the k-th score occurs more often, topk may have taken any of its labels.
    tied = (logits >= scores[:, -1:]).sum(dim=1) > k
    if tied.any():
        labels[tied] = logits[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return labels


def _labels_and_top(batch: ImageBatch, logits: Tensor) -> Tensor:
    """Return a row [1 + K] per image, unreadable ones last: true class, most likely classes."""
    k = min(_NUM_KEPT, logits.shape[1])
    top = stable_topk(logits, k)
    unreadable = torch.full((len(batch.unreadable_labels), k), _UNREADABLE)
    labels = torch.cat([batch.labels, batch.unreadable_labels])
    return torch.cat([labels[:, None], torch.cat([top.cpu(), unreadable])], dim=1).int()


def _check_labels(batch: ImageBatch, num_classes: int) -> None:
    for label in chain(batch.labels.tolist(), batch.unreadable_labels.tolist()):
        if not 0 <= label < num_classes:
            raise ValueError(f"label ({label}) must be in [0, {num_classes}), the classes")


@torch.no_grad()
def _logits(encode_image: Encoder, classifier: Tensor, batch: ImageBatch) -> Tensor:
    if len(batch.images) == 0:
        return classifier.new_empty(0, classifier.shape[1])
    features = encode_image(batch.images.to(classifier.device, non_blocking=True))
    return 100.0 * unit_features(features, batch.keys) @ classifier  # [B, C]


def _predictions(batch: ImageBatch, logits: Tensor, classes: ClassList) -> list[Prediction]:
    probabilities = logits.softmax(dim=1)
    top = stable_topk(probabilities, min(5, len(classes)))
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


def _log_uncounted(result: ZeroShotResult) -> None:
    if len(result.classes) <= 5:
        logger.info("top-5 over %d classes counts every sample as right", len(result.classes))
    if result.unreadable:
        logger.warning(
            "%d of %d images cannot be read (%s) and count as wrong",
            *(len(result.unreadable), result.num_samples, describe_unreadable(result.unreadable)),
        )


def _save_part(file: Path, part: _Part) -> None:
    unreadable = bytearray(json.dumps(part.unreadable).encode())
    save_tensors(
        file, {"rows": part.rows, "unreadable": torch.frombuffer(unreadable, dtype=torch.uint8)}
    )


def _load_part(file: Path) -> _Part | None:
    """Return the part of a file, or None if the file is missing or damaged."""
    tensors = load_tensors(file)
    if tensors is None or tensors.keys() != {"rows", "unreadable"}:
        return None
    unreadable = json.loads(tensors["unreadable"].numpy().tobytes())
    return _Part(tensors["rows"], tuple(UnreadableImage(*fields) for fields in unreadable))

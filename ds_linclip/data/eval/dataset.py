"""Held-out images with their classes, in batches that do not depend on who reads them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler, Subset

from ds_linclip.data.eval.image_index import Findings, LabelledImages
from ds_linclip.data.loader import ordered_loader
from ds_linclip.data.tar_index import BadSample
from ds_linclip.data.transforms import EvalTransform

__all__ = ["LabelledBatch", "LabelledData"]


@dataclass(frozen=True)
class LabelledBatch:
    """Held-out images with their classes.

    Attributes:
        number: Of the batch.
        images: [B, 3, H, W] float32, normalised; [0, 3, 0, 0] where not one can be read.
        labels: [B] int64 class numbers.
        keys: Key of each sample within its tar, or path within the folder.
        captions: Text of each sample; empty where it has none.
        unreadable_labels: [U] int64, the classes of the images that cannot be read.
        unreadable: Their keys, and why they cannot be read.
    """

    number: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]
    unreadable_labels: Tensor
    unreadable: list[tuple[str, str]]

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class LabelledData:
    """A held-out folder, opened and checked once, then read as often as wanted.

    Batch b holds samples b * batch_size, ... of one fixed order. Whoever evaluates shares out the
    numbers of the batches, so a batch is the same on any number of ranks; nothing is padded,
    repeated or dropped.

    Args:
        folder: Of a form that :mod:`~ds_linclip.data.eval.image_index` knows.
        transform: Image file to model input.
        batch_size: Samples per batch; the last may be smaller.
        num_workers: Decoding processes.
        classes: Ids in the order of their labels; None: the folder is in clip_benchmark's layout.
        split: Of clip_benchmark's folders of tars; one without it has ``test``.
        needs_classes: Without it, a folder that names no classes is read for its captions.
        strict: What is wrong with the folder is an error, for a score over fewer samples would not
            be the score. Otherwise it is counted: in ``findings``, and in the batches.

    Attributes:
        classnames: The names, or the ids; the index of one is its label.
        templates: Prompts with a place for the name; empty with ``classes``.
        num_samples: Images of all batches, the unreadable ones too.
        num_batches: How many batches there are.
        findings: What is wrong with the folder, as far as it shows without decoding.

    Raises:
        ValueError: naming the field; at construction as :class:`LabelledImages`; while iterating
            for an image out of reach, or, with ``strict``, one that cannot be decoded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        transform: EvalTransform,
        batch_size: int,
        num_workers: int = 0,
        classes: Sequence[str] | None = None,
        split: str = "test",
        needs_classes: bool = True,
        strict: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        self._images = LabelledImages(
            Path(folder), classes, split=split, needs_classes=needs_classes, strict=strict
        )
        self._dataset = _BatchDataset(Path(folder), self._images, transform, batch_size, strict)
        self._transform = transform
        self._batch_size = batch_size
        self._strict = strict
        self._num_workers = num_workers
        self.classnames: list[str] = self._images.classnames
        self.templates: list[str] = self._images.templates
        self.findings: Findings = self._images.findings
        self.num_samples = len(self._images)
        self.num_batches = -(-self.num_samples // batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys and labels in order, and of the arguments; the same for every copy."""
        return self._digest(self._images.fingerprint())

    @cached_property
    def version(self) -> str:
        """The same, and of sizes and times of the files: no two sets of images have one.

        Raises:
            OSError: the file system is not answering.
        """
        return self._digest(self._images.version())

    def _digest(self, images: str) -> str:
        content = f"{images} {self._transform.preprocess} {self._batch_size} {self._strict}"
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, numbers: Sequence[int]) -> Iterator[LabelledBatch]:
        """Batches by their numbers, in the order asked for; workers end with the iterator.

        Raises:
            ValueError: for a number that no batch has, or as the class.
        """
        for number in numbers:
            if not 0 <= number < self.num_batches:
                raise ValueError(f"numbers ({number}) must be in [0, {self.num_batches})")
        share = Subset(self._dataset, numbers)
        sampler = SequentialSampler(share)
        for item in ordered_loader(share, sampler, num_workers=self._num_workers):
            if isinstance(item, ValueError):
                raise item
            yield item

    def __iter__(self) -> Iterator[LabelledBatch]:
        return self.batches(range(self.num_batches))


class _BatchDataset(Dataset[LabelledBatch | ValueError]):
    """Maps a batch number to its batch."""

    def __init__(
        self,
        folder: Path,
        images: LabelledImages,
        transform: EvalTransform,
        batch_size: int,
        strict: bool,
    ) -> None:
        self._folder = folder
        self._images = images
        self._transform = transform
        self._batch_size = batch_size
        self._strict = strict

    def __getitem__(self, number: int) -> LabelledBatch | ValueError:
        start = number * self._batch_size
        samples = range(start, min(start + self._batch_size, len(self._images)))
        pixels, captions, readable = [], [], []
        reasons: dict[int, str] = {}
        for sample in samples:
            try:
                content, caption = self._images.read(sample)
                pixels.append(self._transform(content))
            except (BadSample, OSError, ValueError) as error:
                # That the file system is not answering says nothing about the image.
                if self._strict or isinstance(error, OSError):
                    # As a value: raised in a worker, it would arrive as a traceback.
                    where = self._images.where(sample)
                    return ValueError(
                        f"eval.data ({self._folder}): {where} must be readable: {error}"
                    )
                reasons[sample] = str(error)
                continue
            captions.append(caption)
            readable.append(sample)
        return LabelledBatch(
            number=number,
            images=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            labels=self._labels(readable),
            keys=[self._images.key(sample) for sample in readable],
            captions=captions,
            unreadable_labels=self._labels(list(reasons)),
            unreadable=[(self._images.key(sample), reason) for sample, reason in reasons.items()],
        )

    def _labels(self, samples: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._images.labels[samples].astype(np.int64))

"""Held-out images with their classes, in batches that are the same on any number of ranks."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler, Subset

from ds_linclip.data.eval.image_index import FolderFindings, LabelledImages
from ds_linclip.data.loader import ordered_loader
from ds_linclip.data.tar_index import BadSample
from ds_linclip.data.transforms import EvalTransform

__all__ = ["LabelledBatch", "LabelledData"]


@dataclass(frozen=True)
class LabelledBatch:
    """B decoded images and U images that could not be decoded, with their classes.

    Attributes:
        number: The number of the batch.
        images: [B, 3, H, W] float32, normalised; [0, 3, 0, 0] when no image can be decoded.
        labels: [B] int64 class numbers.
        keys: The key of each image: its name in its tar, or its path in the folder.
        captions: The text of each image; empty when it has none.
        unreadable_labels: [U] int64, the class numbers of the images that cannot be decoded.
        unreadable: The key of each of these images and the reason.
    """

    number: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]
    unreadable_labels: Tensor
    unreadable: list[tuple[str, str]]

    def pin_memory(self) -> Self:
        """Return the batch in pinned memory, for torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class LabelledData:
    """A held-out folder, opened and checked once, that can be read repeatedly.

    Batch b holds the samples from b * batch_size on, of one fixed order. Ranks divide batch numbers
    among themselves, so a batch is the same on any number of ranks; nothing is padded, repeated or
    dropped.

    Args:
        folder: A folder in one of the forms of :mod:`~ds_linclip.data.eval.image_index`.
        transform: Maps an image file to model input.
        batch_size: Samples per batch; the last batch may be smaller.
        num_workers: Decoding processes.
        classes: Ids in the order of their labels; None: the folder is in clip_benchmark's layout.
        split: The folder of tars that is preferred to ``test``; tars in ``folder`` itself are
            preferred to both.
        needs_classes: Whether a folder that names no classes is an error. Otherwise its images have
            the label 0, and only their captions matter.
        strict: Whether a defect of the folder is an error (except for a class of
            ``classnames.txt`` without images). Otherwise it is counted, in ``findings`` and in the
            batches.

    Attributes:
        classnames: The names or ids of the classes, in the order of their labels.
        templates: Prompt templates; empty when ``classes`` was given.
        num_samples: The number of images, unreadable ones included.
        num_batches: The number of batches.
        findings: The defects of the folder that show without decoding.

    Raises:
        ValueError: for the arguments and defects that :class:`LabelledImages` refuses; while
            iterating, for an image that cannot be accessed or, if ``strict``, decoded.
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
        self._num_workers = num_workers
        self.classnames: list[str] = self._images.classnames
        self.templates: list[str] = self._images.templates
        self.findings: FolderFindings = self._images.findings
        self.num_samples = len(self._images)
        self.num_batches = -(-self.num_samples // batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, labels and arguments; the same for every copy of the folder."""
        return self._digest(self._images.fingerprint())

    @cached_property
    def version(self) -> str:
        """SHA-256 of the fingerprint and the files' sizes and times; it changes with an image.

        Raises:
            OSError: when the file system does not answer.
        """
        return self._digest(self._images.version())

    def _digest(self, images: str) -> str:
        data = self._dataset
        content = f"{images} {data.transform.preprocess} {data.batch_size} {data.strict}"
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, numbers: Sequence[int]) -> Iterator[LabelledBatch]:
        """Yield batches by their numbers, in the given order; workers end with the iterator.

        Raises:
            ValueError: for a number that no batch has, or an image that cannot be used.
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


@dataclass(frozen=True)
class _BatchDataset(Dataset[LabelledBatch | ValueError]):
    """Batches by their number; an unusable image is returned as an error."""

    folder: Path
    images: LabelledImages
    transform: EvalTransform
    batch_size: int
    strict: bool

    def __getitem__(self, number: int) -> LabelledBatch | ValueError:
        start = number * self.batch_size
        pixels: list[Tensor] = []
        captions: list[str] = []
        readable: dict[int, str] = {}  # number of a sample -> its key
        unreadable: dict[int, tuple[str, str]] = {}  # number of a sample -> its key, the reason
        for sample in range(start, min(start + self.batch_size, len(self.images))):
            part, row = self.images.find(sample)
            try:
                content, caption = part.read(row)
                pixels.append(self.transform(content))
            except (BadSample, OSError, ValueError) as error:
                # A file system that does not answer is not a defect of the image.
                if self.strict or isinstance(error, OSError):
                    # Returned, since an error raised in a worker arrives as a traceback.
                    return ValueError(
                        f"eval.data ({self.folder}): {part.where(row)} must be readable: {error}"
                    )
                unreadable[sample] = (part.key(row), str(error))
                continue
            captions.append(caption)
            readable[sample] = part.key(row)
        return LabelledBatch(
            number=number,
            images=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            labels=self._labels(readable),
            keys=list(readable.values()),
            captions=captions,
            unreadable_labels=self._labels(unreadable),
            unreadable=list(unreadable.values()),
        )

    def _labels(self, samples: Iterable[int]) -> Tensor:
        return torch.from_numpy(self.images.labels[list(samples)].astype(np.int64))

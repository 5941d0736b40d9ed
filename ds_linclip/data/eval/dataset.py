"""Held-out images with their classes, in batches that are the same on any number of ranks."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ds_linclip.data.eval.image_index import FolderFindings, open_parts, read_classes
from ds_linclip.data.eval.sources import LabelledPart
from ds_linclip.data.eval.unreadable import UnreadableImage, describe_unreadable
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.data.tar_index import BadSample
from ds_linclip.data.transforms import EvalTransform

__all__ = ["LabelledBatch", "LabelledData"]


@dataclass(frozen=True)
class LabelledBatch:
    """B decoded images and U images that could not be decoded, with their classes."""

    number: int
    images: Tensor  # [B, 3, H, W] float32, normalised; [0, 3, 0, 0] when no image can be decoded
    labels: Tensor  # [B] int64 class numbers
    keys: list[str]  # the name of each image in its tar, or its path in the folder
    captions: list[str]  # the text of each image; empty when it has none
    unreadable_labels: Tensor  # [U] int64
    unreadable: list[UnreadableImage]

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
        needs_classes: Whether classes matter. Otherwise all images have the label 0.
        strict: Whether a defect of the folder is an error (except for a class of
            ``classnames.txt`` without images). Otherwise it is counted, in ``findings`` and in the
            batches.
        max_bad_samples: The number of unreadable images that are counted even if ``strict``.

    Attributes:
        folder, batch_size, num_workers: As given.
        classnames: The names or ids of the classes, in the order of their labels.
        templates: Prompt templates; empty when ``classes`` was given.
        num_samples: The number of images, unreadable ones included.
        num_batches: The number of batches.
        findings: The defects of the folder that show without decoding.

    Raises:
        ValueError: naming ``eval.data`` or the argument, for a folder that lacks a file, has an
            unknown form, holds no image, cannot be read or, if ``strict``, has defects; while
            iterating, for an image that cannot be accessed, or for too many unreadable ones.
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
        max_bad_samples: int = 0,
    ) -> None:
        self.folder, self._strict, self._max_bad = Path(folder), strict, max_bad_samples
        self._transform, self.batch_size, self.num_workers = transform, batch_size, num_workers
        try:
            if not self.folder.is_dir():
                found = "it is a file" if self.folder.exists() else "there is none"
                found = "it is a URL" if "://" in str(folder) else found
                raise ValueError(f"eval.data ({folder}) must be a folder on this machine; {found}")
            self.classnames, self.templates, labels = read_classes(
                self.folder, classes, needs_classes=needs_classes
            )
            parts, layout = open_parts(self.folder, labels, split)
        except OSError as error:
            raise ValueError(f"eval.data ({folder}) must be readable: {error}") from error
        self.findings = FolderFindings.of(parts, layout, self.classnames)
        self._parts = [part for part in parts if len(part.labels)]
        self._check(has_ids=classes is not None)
        self._labels = np.concatenate([part.labels for part in self._parts])
        self._ends = list(accumulate(len(part.labels) for part in self._parts))
        self._open_part = self._parts[0]
        self.num_samples = len(self._labels)
        self.num_batches = -(-self.num_samples // batch_size)

    def _check(self, *, has_ids: bool) -> None:
        findings = self.findings
        too_many = len(findings.unreadable) > self._max_bad
        defects = "; ".join(findings.describe())
        if not self._parts:
            end = f": {defects}" if findings.has_defects else ""
            raise ValueError(f"eval.data ({self.folder}) must hold at least one sample{end}")
        if self._strict and (
            findings.has_defects or too_many or (has_ids and findings.empty_classes)
        ):
            raise ValueError(
                f"eval.data ({self.folder}) must hold whole samples of its classes: {defects}"
            )

    def require_readable(self, unreadable: Sequence[UnreadableImage]) -> None:
        """Check the number of unreadable images that iterations have found, on all ranks together.

        Raises:
            ValueError: naming one of them, for more than ``max_bad_samples`` if ``strict``.
        """
        if self._strict and len(unreadable) > self._max_bad:
            first = unreadable[0]
            raise ValueError(
                f"eval.data ({self.folder}): {first.where} must be readable: {first.cause}; "
                f"max_bad_samples is {self._max_bad}, found {describe_unreadable(unreadable)}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, labels and arguments; the same for every copy of the folder."""
        return self._digest(self._content)

    @cached_property
    def version(self) -> str:
        """SHA-256 of the fingerprint and the files' sizes and times; it changes with an image.

        Raises:
            OSError: when the file system does not answer.
        """
        return self._digest(self.files_version)

    @cached_property
    def files_version(self) -> str:
        """SHA-256 of keys, labels, and the files' sizes and times.

        Raises:
            OSError: when the file system does not answer.
        """
        versions = "".join(part.version() for part in self._parts)
        return hashlib.sha256((self._content + versions).encode()).hexdigest()

    @cached_property
    def _content(self) -> str:
        """SHA-256 of all keys and labels, in order."""
        digest = hashlib.sha256(self._labels.astype("<i4").tobytes())
        for part in self._parts:
            digest.update(b"\0".join(part.names.to_pylist()) + b"\0")
        return digest.hexdigest()

    def _digest(self, images: str) -> str:
        content = f"{images} {self._transform.preprocess} {self.batch_size}"
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, numbers: Sequence[int]) -> Iterator[LabelledBatch]:
        """Yield batches by their numbers, in the given order; workers end with the iterator.

        Raises:
            ValueError: for a number that no batch has, an image that cannot be accessed, or as soon
                as these batches alone have too many unreadable images.
        """
        for number in numbers:
            if not 0 <= number < self.num_batches:
                raise ValueError(f"numbers ({number}) must be in [0, {self.num_batches})")
        unreadable: list[UnreadableImage] = []
        with closing(ordered_map(self._read, numbers, num_workers=self.num_workers)) as batches:
            for batch in batches:
                unreadable += batch.unreadable
                self.require_readable(unreadable)
                yield batch

    def __iter__(self) -> Iterator[LabelledBatch]:
        return self.batches(range(self.num_batches))

    def unreadable_images(self, numbers: Sequence[int]) -> Iterator[list[UnreadableImage]]:
        """Decode batches, and yield the images of each that cannot be read.

        Raises:
            ValueError: for an image that cannot be accessed.
        """
        yield from ordered_map(self._unreadable_in, numbers, num_workers=self.num_workers)

    def _unreadable_in(self, number: int) -> list[UnreadableImage]:
        return self._read(number).unreadable

    def _read(self, number: int) -> LabelledBatch:
        """Decode a batch, in a worker."""
        start = number * self.batch_size
        pixels: list[Tensor] = []
        captions: list[str] = []
        readable: dict[int, str] = {}  # number of a sample -> its key
        unreadable: dict[int, UnreadableImage] = {}  # by the number of the sample
        for sample in range(start, min(start + self.batch_size, self.num_samples)):
            part, row = self._find(sample)
            try:
                content, caption = part.read(row)
                pixels.append(self._transform(content))
            except (BadSample, ValueError) as error:
                unreadable[sample] = part.unreadable_image(row, str(error))
                continue
            except OSError as error:
                # A file system that does not answer is not a defect of the image.
                raise ValueError(
                    f"eval.data ({self.folder}): {part.where(part.key(row))} must be readable: "
                    f"{error}"
                ) from error
            captions.append(caption)
            readable[sample] = part.key(row)
        return LabelledBatch(
            number=number,
            images=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            labels=self._labels_of(readable),
            keys=list(readable.values()),
            captions=captions,
            unreadable_labels=self._labels_of(unreadable),
            unreadable=list(unreadable.values()),
        )

    def _find(self, sample: int) -> tuple[LabelledPart, int]:
        """Return the part that holds an image, and its row there; other parts are closed."""
        index = bisect_right(self._ends, sample)
        part = self._parts[index]
        if part is not self._open_part:
            self._open_part.close()
            self._open_part = part
        return part, sample - self._ends[index] + len(part.labels)

    def _labels_of(self, samples: Iterable[int]) -> Tensor:
        return torch.from_numpy(self._labels[list(samples)].astype(np.int64))

"""The parts of a labelled set: tars, and folders of a class. Opening one decodes no image."""

import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.causes import printable
from ds_linclip.data.eval.unreadable import UnreadableImage
from ds_linclip.data.folder_files import files_below
from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_index import IMAGE_SUFFIXES, BadSample, OpenShard, Role
from ds_linclip.data.transforms import MAX_IMAGE_BYTES

__all__ = ["ClassFolder", "ClassLabels", "LabelledPart", "LabelledTar"]

_NOT_AN_IMAGE = "not_an_image"  # an annotation
_NOTE_SUFFIXES = (".txt", ".xml", ".json", ".csv", ".tsv", ".md", ".mat", ".ini", ".db")
_MAX_CLASS_BYTES = 32
_NUMBER = re.compile(r"[0-9]{1,18}")
_NOWHERE = (-1, 0)  # offset and size


@dataclass(frozen=True)
class ClassLabels:
    """The label of each class's id (none when classes have only numbers), and their number."""

    ids: Mapping[str, int]
    num_classes: int

    def label(self, name: str) -> int | None:
        """Return the label of an id or class number; None when it is unknown."""
        if name in self.ids:
            return self.ids[name]
        # int() alone would also take "1_0" for 10.
        if _NUMBER.fullmatch(name) and int(name) < self.num_classes:
            return int(name)
        return None


class LabelledPart(ABC):
    """A tar or folder: images and their labels, in a fixed order.

    Attributes:
        names: Keys or file names, as bytes in one buffer: Python strings of millions of names would
            take several times the memory.
        labels: [n] int32 class numbers.
        unknown_classes: The number of images left out, by the class that is not in the list.
        problems: Descriptions of what is left out, by cause.
        unreadable: The samples that are known to be unreadable.
        passed_over: The members or files that are never read.

    Raises:
        OSError: from the constructor, when the file system does not answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unknown_classes = Tally()
        self.problems: dict[str, list[str]] = defaultdict(list)
        self.unreadable: list[UnreadableImage] = []
        self.passed_over = Tally()
        self._file: BinaryIO | None = None
        self._fill([], [])

    def key(self, row: int) -> str:
        """Return the name of one image."""
        return os.fsdecode(self.names[row].as_py())

    def unreadable_image(self, row: int, cause: str) -> UnreadableImage:
        """Describe an image that cannot be read."""
        return UnreadableImage(self.key(row), cause, self.where(self.key(row)))

    @abstractmethod
    def where(self, key: str) -> str:
        """Return the description of an image for messages."""

    @abstractmethod
    def read(self, row: int) -> tuple[bytes, str]:
        """Return image file and caption; an image without a caption has an empty one.

        Raises:
            BadSample: when the data are damaged.
            OSError: when the file cannot be accessed, or has changed since it was opened.
        """

    @abstractmethod
    def version(self) -> str:
        """Return sizes and modification times of the files, which change when an image does.

        Raises:
            OSError: when the file system does not answer.
        """

    def close(self) -> None:
        """Close the file that reading has opened."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fill(self, keys: Iterable[str], labels: Iterable[int]) -> None:
        self.names = pa.array([os.fsencode(key) for key in keys], pa.binary())
        self.labels = np.array(labels, np.int32)

    def _leave_out(self, class_name: str, keys: list[str]) -> None:
        if keys:
            self.unknown_classes.add(class_name, self.where(keys[0]), len(keys))


class LabelledTar(LabelledPart):
    """A tar of images with their classes.

    Its file is open only while it is read: a set may have more tars than a process may open files.

    Args:
        path, classes: The tar, and the known classes.
        num_samples: The number of samples that it is said to hold, or more; None: nothing is said.
        class_id: The class of all images without a ``cls`` member; None: each image must have one;
            empty: ``cls`` members are ignored.
    """

    def __init__(
        self,
        path: Path,
        classes: ClassLabels,
        *,
        class_id: str | None,
        num_samples: int | None = None,
    ) -> None:
        super().__init__(path)
        self._identity = _identity(os.stat(path))
        self._images = np.empty((0, 2), np.int64)  # offset and size
        self._texts: dict[int, tuple[int, int]] = {}
        self._unreadable: dict[int, str] = {}
        try:
            shard = OpenShard(path.open("rb"), str(path))
        except BadSample as error:
            self.problems[error.cause].append(str(path))
            self.passed_over = error.passed_over
            return
        self.passed_over = shard.passed_over
        with closing(shard):
            if shard.cut:
                self.problems["shard_cut"].append(str(path))
            if num_samples is not None and len(shard) < num_samples:
                found = f"{path}: {len(shard)} of {num_samples} samples"
                self.problems["shard_short"].append(found)
            if class_id is None or (class_id and _has_class(shard)):
                self._index(shard, self._read_labels(shard, classes))
            elif class_id in classes.ids:
                self._index(shard, dict.fromkeys(range(len(shard)), classes.ids[class_id]))
            else:
                self._leave_out(class_id, shard.keys)

    def read(self, row: int) -> tuple[bytes, str]:
        if row in self._unreadable:
            raise BadSample(self._unreadable[row])
        offset, size = self._images[row].tolist()
        content = self._pread(offset, size, "image")
        if row not in self._texts:
            return content, ""
        try:
            return content, decode_text(self._pread(*self._texts[row], "text"))
        except BadSample as error:
            if error.cause != "text_empty":
                raise
            return content, ""

    def where(self, key: str) -> str:
        return f"sample {printable(key)} of {self.path}"

    def _read_labels(self, shard: OpenShard, classes: ClassLabels) -> dict[int, int]:
        """Return the labels of the samples that have one, by their index in the tar."""
        labels = {}
        for index, key in enumerate(shard.keys):
            try:
                content = shard.read(index, "class", max_bytes=_MAX_CLASS_BYTES)
            except BadSample as error:
                self.problems[error.cause].append(self.where(key))
                continue
            name = content.decode("utf-8-sig", "replace").strip()
            label = classes.label(name)
            if label is None:
                self._leave_out(name, [key])
            else:
                labels[index] = label
        return labels

    def _index(self, shard: OpenShard, labels: Mapping[int, int]) -> None:
        """Keep names, labels and offsets of the samples with a label."""
        self._fill((shard.keys[index] for index in labels), list(labels.values()))
        images = []
        for row, index in enumerate(labels):
            image = _NOWHERE
            try:
                image = shard.find(index, "image", max_bytes=MAX_IMAGE_BYTES)
                self._texts[row] = shard.find(index, "text", max_bytes=MAX_TEXT_BYTES)
            except BadSample as error:
                if error.cause != "text_missing":
                    self._unreadable[row] = error.cause
                    self.unreadable.append(self.unreadable_image(row, error.cause))
            images.append(image)
        self._images = np.array(images, np.int64).reshape(-1, 2)

    def version(self) -> str:
        return f"{self.path.name} {self._identity}"

    def _pread(self, offset: int, size: int, role: Role) -> bytes:
        if self._file is None:
            self._file = self.path.open("rb")
            if _identity(os.fstat(self._file.fileno())) != self._identity:
                self.close()
                raise OSError(f"{self.path} has changed since it was opened")
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise BadSample(f"{role}_cut")
        return content


class ClassFolder(LabelledPart):
    """A folder of images, named by the id of their class.

    Images in folders below it (Tiny ImageNet has ``images``) belong to it too.
    """

    def __init__(self, path: Path, classes: ClassLabels) -> None:
        super().__init__(path)
        by_cause: dict[str, list[str]] = defaultdict(list)
        for name, is_file in files_below(path, self.passed_over):
            # A link may lead to nothing.
            by_cause[_defect(name) if is_file else "not_a_file"].append(f"{path.name}/{name}")
        if notes := by_cause.pop(_NOT_AN_IMAGE, []):
            self.passed_over.add(_NOT_AN_IMAGE, min(notes), len(notes))
        keys = sorted(by_cause.pop("", []))
        if path.name not in classes.ids:
            self._leave_out(path.name, keys)
            return
        self._fill(keys, [classes.ids[path.name]] * len(keys))
        for cause, names in by_cause.items():
            self.problems[cause] += [self.where(name) for name in sorted(names)]

    def read(self, row: int) -> tuple[bytes, str]:
        with open(self.path.parent / self.key(row), "rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
        if len(content) > MAX_IMAGE_BYTES:
            raise BadSample("image_too_many_bytes")
        return content, ""

    def version(self) -> str:
        files = (self.path.parent / self.key(row) for row in range(len(self.labels)))
        return f"{self.path.name} {[_identity(os.stat(file)) for file in files]}"

    def where(self, key: str) -> str:
        return f"image {printable(str(self.path.parent / key))}"


def _defect(name: str) -> str:
    """Return why a file is not an image, or nothing."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    return _NOT_AN_IMAGE if suffix in _NOTE_SUFFIXES else "image_extension"


def _has_class(shard: OpenShard) -> bool:
    try:
        shard.find(0, "class", max_bytes=_MAX_CLASS_BYTES)
    except BadSample as error:
        return error.cause != "class_missing"
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns

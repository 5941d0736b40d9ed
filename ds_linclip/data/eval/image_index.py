"""The labelled images of a held-out folder, by number, in one fixed order.

A folder has one of four forms:

- clip_benchmark's webdataset: ``classnames.txt``, ``zeroshot_classification_templates.txt`` (with
  ``{c}``, or open_clip's ``{}``, for the class) and tars in ``test``, ``train`` or the folder
  itself, with an image, ``cls`` (the class number) and optionally ``txt`` per sample;
- such tars without these files, given a list of classes; ``cls`` may hold an id of the list;
- one tar of images per class, named by its id (``n02084071.tar``), as in ImageNet-21K;
- one folder of images per class, named by its id.

A set of captions, such as clip_benchmark's for retrieval, has tars with an image and ``txt`` per
sample, and no classes.
"""

import hashlib
import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ds_linclip.data.eval.sources import ClassFolder, ClassLabels, LabelledPart, LabelledTar

__all__ = ["FolderFindings", "LabelledImages"]

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_SYNSET = re.compile(r"n\d{8}")  # WordNet's ids
#: The labels of a folder without classes: all images have the label 0.
_NO_CLASSES = {"": 0}
_OPENED_AT_ONCE = 8  # network file systems are slow but answer many requests at once
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class FolderFindings:
    """The defects of a held-out folder that show in names, sizes and classes.

    Attributes:
        num_classes: The length of the list of classes.
        unknown_classes: The number of images left out, by the class that is not in the list.
        first_unknown: The first of these images; empty when there are none.
        empty_classes: The classes of the list without an image.
        problems: Descriptions by cause: tars that cannot be read to their end
            (``shard_unreadable``, ``shard_cut``); samples and files left out (``class_missing``,
            ``class_too_many_bytes``, ``class_cut``, ``image_extension``); samples that count as
            unreadable (``image_missing``, ``image_too_many_bytes``, ``text_too_many_bytes``).
    """

    num_classes: int
    unknown_classes: Mapping[str, int]
    first_unknown: str
    empty_classes: tuple[str, ...]
    problems: Mapping[str, Sequence[str]]

    def describe(self) -> list[str]:
        """Return a line for each kind of defect, with counts and the first examples."""
        lines = []
        if self.unknown_classes:
            counts = [f"{name}: {count}" for name, count in self.unknown_classes.items()]
            lines.append(
                f"images of classes that are not among the {self.num_classes} of the list: "
                f"{sum(self.unknown_classes.values())} ({_first(counts)}), first "
                f"{self.first_unknown}"
            )
        if self.empty_classes:
            lines.append(
                f"classes without an image: {len(self.empty_classes)} of {self.num_classes} "
                f"({_first(self.empty_classes)})"
            )
        for cause, names in self.problems.items():
            lines.append(f"{cause}: {len(names)} ({_first(names)})")
        return lines


class LabelledImages:
    """The images of a folder with their labels; only names, offsets and classes are read at first.

    Tars are in the order of their names, samples in the order of their tar; folders of classes and
    the files in them are in the order of their names.

    Args:
        folder, classes, split, needs_classes, strict: See :class:`LabelledData`.

    Attributes:
        classnames: The names or ids of the classes, in the order of their labels.
        templates: Prompt templates; empty when ``classes`` was given.
        labels: [N] int32 class numbers.
        findings: The defects of the folder.

    Raises:
        ValueError: naming ``eval.data`` or ``classes``, for a list of classes that is empty or
            repeats one; for a folder that lacks a file, has an unknown form, holds no image or
            cannot be read; if ``strict``, for a folder with defects.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str] | None = None,
        *,
        split: str = "test",
        needs_classes: bool = True,
        strict: bool = True,
    ) -> None:
        self.templates: list[str] = []
        if classes is None and not needs_classes and not (folder / _CLASSNAMES).exists():
            self.classnames = [""]
            class_list = ClassLabels(_NO_CLASSES, 1)
        elif classes is None:
            self.classnames = _read_lines(folder / _CLASSNAMES)
            self.templates = _read_lines(folder / _TEMPLATES)
            class_list = ClassLabels({}, len(self.classnames))
        else:
            self.classnames = list(classes)
            class_list = ClassLabels(_labels_by_id(classes), len(classes))
        try:
            parts = _open_parts(folder, class_list, split)
        except OSError as error:
            raise ValueError(f"eval.data ({folder}) must be readable: {error}") from error
        self.labels = np.concatenate([part.labels for part in parts])
        self.findings = _findings(parts, self.labels, self.classnames)
        self._parts = [part for part in parts if len(part.labels)]
        self._ends = list(accumulate(len(part.labels) for part in self._parts))
        self._check(folder, strict, has_ids=classes is not None)
        self._current = self._parts[0]

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, number: int) -> tuple[LabelledPart, int]:
        """Return the part that holds an image, and its row there; other parts are closed."""
        index = bisect_right(self._ends, number)
        part = self._parts[index]
        if part is not self._current:
            self._current.close()
            self._current = part
        return part, number - self._ends[index] + len(part.labels)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all keys and labels, in order."""
        digest = hashlib.sha256(self.labels.astype("<i4").tobytes())
        for part in self._parts:
            digest.update(b"\0".join(part.names.to_pylist()) + b"\0")
        return digest.hexdigest()

    def version(self) -> str:
        """Return the SHA-256 of the fingerprint and of the files' sizes and times.

        Raises:
            OSError: when the file system does not answer.
        """
        digest = hashlib.sha256(self.fingerprint().encode())
        for part in self._parts:
            digest.update(part.version().encode())
        return digest.hexdigest()

    def _check(self, folder: Path, strict: bool, *, has_ids: bool) -> None:
        findings = self.findings
        has_defects = bool(findings.unknown_classes or findings.problems)
        defects = "; ".join(findings.describe())
        if not self._parts:
            end = f": {defects}" if has_defects else ""
            raise ValueError(f"eval.data ({folder}) must hold at least one sample{end}")
        if strict and (has_defects or (has_ids and findings.empty_classes)):
            raise ValueError(
                f"eval.data ({folder}) must hold whole samples of its classes: {defects}"
            )


def _open_parts(folder: Path, classes: ClassLabels, split: str) -> Sequence[LabelledPart]:
    open_part: Callable[[Path], LabelledPart]
    paths = _find_tars(folder, split)
    if paths and classes.ids == _NO_CLASSES:
        open_part = partial(LabelledTar, classes=classes, class_id="")
    elif paths:
        named = any(path.stem in classes.ids or _SYNSET.fullmatch(path.stem) for path in paths)
        is_class = named and bool(classes.ids)

        def open_part(path: Path) -> LabelledPart:
            return LabelledTar(path, classes, class_id=path.stem if is_class else None)

    elif classes.ids:
        paths = _find_folders(folder)
        open_part = partial(ClassFolder, classes=classes)
    if not paths:
        form = ", or one with a folder of images for each class" if classes.ids else ""
        raise ValueError(
            f"eval.data ({folder}) must be a folder with tars in it or in its test folder{form}"
        )
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        parts = pool.map(open_part, paths)
        what = f"opening {folder.name}"
        return list(tqdm(parts, what, len(paths), delay=2, leave=False, disable=None))


def _find_tars(folder: Path, split: str) -> list[Path]:
    for place in (folder, folder / split, folder / "test"):
        tars = [path for path in place.glob("*.tar") if not path.name.startswith(".")]
        if tars:
            return sorted(tars, key=lambda path: (len(path.stem), path.stem))
    return []


def _find_folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [folder / name for name in sorted(names)]


def _findings(
    parts: Sequence[LabelledPart], labels: np.ndarray, classnames: Sequence[str]
) -> FolderFindings:
    unknown: Counter[str] = Counter()
    problems: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        unknown.update(part.unknown_classes)
        for cause, names in part.problems.items():
            problems[cause] += names
    counts = np.bincount(labels, minlength=len(classnames))
    return FolderFindings(
        num_classes=len(classnames),
        unknown_classes=dict(unknown),
        first_unknown=next((part.first_unknown for part in parts if part.first_unknown), ""),
        empty_classes=tuple(classnames[label] for label in np.flatnonzero(counts == 0)),
        problems=dict(problems),
    )


def _labels_by_id(classes: Sequence[str]) -> dict[str, int]:
    if not classes:
        raise ValueError("classes ([]) must hold at least one id")
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise ValueError(f"classes ({_first(repeated)}) must be named once each")
    return {name: label for label, name in enumerate(classes)}


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"eval.data ({path.parent}) must hold a readable {path.name}, or come with a list of "
            "classes"
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"eval.data ({path.parent}) must hold a {path.name} that is not empty")
    return lines


def _first(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NUM_EXAMPLES else ""
    return ", ".join(names[:_NUM_EXAMPLES]) + more

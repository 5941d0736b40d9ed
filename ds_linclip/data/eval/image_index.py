"""The parts of a held-out folder, its classes, and its defects.

A folder has one of four forms:

- clip_benchmark's webdataset: ``classnames.txt``, ``zeroshot_classification_templates.txt`` (with
  ``{c}``, or open_clip's ``{}``, for the class) and tars in ``test``, ``train`` or the folder
  itself, with an image, ``cls`` (the class number) and optionally ``txt`` per sample;
- such tars without these files, given a list of classes; ``cls`` may hold an id of the list;
- one tar of images per class, named by its id (``n02084071.tar``), as in ImageNet-21K;
- one folder of images per class, named by its id.

A set of captions, such as clip_benchmark's for retrieval, has tars with an image and ``txt`` per
sample, and no classes.

Tars are in the order of their names, samples in the order of their tar; folders of classes and the
files in them are in the order of their names.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ds_linclip.data.causes import explain, printable
from ds_linclip.data.eval.sources import ClassFolder, ClassLabels, LabelledPart, LabelledTar
from ds_linclip.process.progress import progress

__all__ = ["FolderFindings", "open_parts", "read_classes"]

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
        unknown_classes: The number of images left out, by the class that is not in the list.
        first_unknown: The first of these images; empty when there are none.
        empty_classes: The classes of the list without an image.
        problems: Descriptions by cause: tars that cannot be read to their end
            (``shard_cut``, ``shard_unreadable`` and the other causes of
            :class:`~ds_linclip.data.tar_index.OpenShard`); samples and files left out
            (``class_missing``, ``class_too_many_bytes``, ``class_cut``, ``image_extension``);
            samples that count as unreadable (``image_missing``, ``image_too_many_bytes``,
            ``text_too_many_bytes``); ``members_apart``, which is either.
        passed_over: Members of tars that are never read, which is no defect: their number and the
            first of them, by cause.
    """

    num_classes: int
    unknown_classes: Mapping[str, int]
    first_unknown: str
    empty_classes: tuple[str, ...]
    problems: Mapping[str, Sequence[str]]
    passed_over: Mapping[str, tuple[int, str]]

    @classmethod
    def of(cls, parts: Sequence[LabelledPart], classnames: Sequence[str]) -> Self:
        """Add up the defects of all parts."""
        unknown: Counter[str] = Counter()
        problems: dict[str, list[str]] = defaultdict(list)
        passed_over: dict[str, tuple[int, str]] = {}
        counts = np.zeros(len(classnames), np.int64)
        for part in parts:
            unknown.update(part.unknown_classes)
            for cause, names in part.problems.items():
                problems[cause] += names
            for cause, (number, name) in part.passed_over.items():
                before, first = passed_over.get(cause, (0, f"{printable(name)} of {part.path}"))
                passed_over[cause] = before + number, first
            counts += np.bincount(part.labels, minlength=len(classnames))
        return cls(
            num_classes=len(classnames),
            unknown_classes=dict(unknown),
            first_unknown=next((part.first_unknown for part in parts if part.first_unknown), ""),
            empty_classes=tuple(classnames[label] for label in np.flatnonzero(counts == 0)),
            problems=dict(problems),
            passed_over=passed_over,
        )

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
            lines.append(f"{explain(cause)}: {len(names)} ({_first(names)})")
        for cause, (number, first) in self.passed_over.items():
            lines.append(f"members passed over: {number}: {explain(cause)}, first {first}")
        return lines


def read_classes(
    folder: Path, classes: Sequence[str] | None, *, needs_classes: bool
) -> tuple[list[str], list[str], ClassLabels]:
    """Return names or ids of the classes, prompt templates (none with ``classes``), and labels.

    Raises:
        ValueError: naming ``classes``, which is empty or repeats one, or ``eval.data``, which lacks
            a file.
    """
    if classes is not None:
        if not classes:
            raise ValueError("classes ([]) must hold at least one id")
        repeated = [name for name, count in Counter(classes).items() if count > 1]
        if repeated:
            raise ValueError(f"classes ({_first(repeated)}) must be named once each")
        ids = {name: label for label, name in enumerate(classes)}
        return list(classes), [], ClassLabels(ids, len(classes))
    if not needs_classes and not (folder / _CLASSNAMES).exists():
        return [""], [], ClassLabels(_NO_CLASSES, 1)
    names = _read_lines(folder / _CLASSNAMES)
    return names, _read_lines(folder / _TEMPLATES), ClassLabels({}, len(names))


def open_parts(folder: Path, classes: ClassLabels, split: str) -> list[LabelledPart]:
    """Index all tars or folders, in order; only names, offsets and classes are read.

    Args:
        folder: A folder in one of the forms above.
        classes: The result of :func:`read_classes`.
        split: The folder of tars that is preferred to ``test``.

    Raises:
        ValueError: naming ``eval.data``: the folder has an unknown form.
        OSError: when the file system does not answer.
    """
    tars = _find_tars(folder, split)
    named = classes.ids and any(t.stem in classes.ids or _SYNSET.fullmatch(t.stem) for t in tars)

    def open_part(path: Path) -> LabelledPart:
        if not tars:
            return ClassFolder(path, classes)
        class_id = "" if classes.ids == _NO_CLASSES else path.stem if named else None
        return LabelledTar(path, classes, class_id=class_id)

    paths = tars or (_find_folders(folder) if classes.ids else [])
    if not paths:
        form = ", or one with a folder of images for each class" if classes.ids else ""
        raise ValueError(
            f"eval.data ({folder}) must be a folder with tars in it or in its test folder{form}"
        )
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        parts = pool.map(open_part, paths)
        what = f"opening {folder.name}"
        return list(progress(parts, what, len(paths), delay=2, leave=False, disable=None))


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

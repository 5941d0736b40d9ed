"""The parts of a held-out folder, its classes, and its defects.

A folder has one of four forms:

- clip_benchmark's webdataset: ``classnames.txt``, ``zeroshot_classification_templates.txt`` (with
  ``{c}``, or open_clip's ``{}``, for the class) and tars in ``test``, ``train`` or the folder
  itself, with an image, ``cls`` (the class number) and optionally ``txt`` per sample;
- such tars without these files, given a list of classes; ``cls`` may hold an id of the list;
- one tar of images per class, named by its id (``n02084071.tar``), as in ImageNet-21K;
- one folder of images per class, named by its id; images may lie in folders below it.

A set of captions, such as clip_benchmark's for retrieval, has tars with an image and ``txt`` per
sample; its classes, if there are any, are ignored.

A folder's ``nshards.txt``, ``_stats.json`` and ``sizes.json`` say how much it holds; less is a
defect. Tars are in the order of their numbers, samples in the order of their tar; folders of
classes and the files in them are in the order of their names.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ds_linclip.data.causes import explain, printable
from ds_linclip.data.eval.layout import Layout, find_parts
from ds_linclip.data.eval.sources import ClassFolder, ClassLabels, LabelledPart, LabelledTar
from ds_linclip.data.eval.unreadable import UnreadableImage, describe_unreadable
from ds_linclip.data.tally import Tally
from ds_linclip.process.progress import progress
from ds_linclip.process.text_files import read_list

__all__ = ["FolderFindings", "open_parts", "read_classes"]

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
#: The labels of a folder without classes: all images have the label 0.
_NO_CLASSES = {"": 0}
_OPENED_AT_ONCE = 8  # network file systems are slow but answer many requests at once
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class FolderFindings:
    """The defects of a held-out folder that show in names, sizes and classes.

    Attributes:
        unknown_classes: The number of images left out, by the class that is not in the list.
        empty_classes: The classes of the list without an image.
        problems: Descriptions by cause: tars that cannot be read to their end
            (``shard_cut``, ``shard_unreadable`` and the other causes of
            :class:`~ds_linclip.data.tar_index.OpenShard`), hold fewer samples than they should
            (``shard_short``) or are not there (see :class:`Layout`); samples and files left out
            (``class_missing``, ``class_too_many_bytes``, ``class_cut``, ``image_extension``,
            ``not_a_file``); ``members_apart``.
        unreadable: The samples that are known to be unreadable, which count as wrong.
        passed_over: Members of tars that are never read and annotations beside images, which are no
            defect.
    """

    num_classes: int
    unknown_classes: Tally
    empty_classes: tuple[str, ...]
    problems: Mapping[str, Sequence[str]]
    unreadable: tuple[UnreadableImage, ...]
    passed_over: Tally

    @classmethod
    def of(cls, parts: Sequence[LabelledPart], layout: Layout, classnames: Sequence[str]) -> Self:
        """Add up the defects of all parts and of their layout."""
        unknown = Tally()
        problems: dict[str, list[str]] = defaultdict(list, layout.problems)
        passed_over = Tally()
        counts = np.zeros(len(classnames), np.int64)
        for part in parts:
            unknown.merge(part.unknown_classes)
            for cause, names in part.problems.items():
                problems[cause] += names
            for cause, number in part.passed_over.items():
                example = f"{part.passed_over.examples[cause]} of {part.path}"
                passed_over.add(cause, example, number)
            counts += np.bincount(part.labels, minlength=len(classnames))
        return cls(
            num_classes=len(classnames),
            unknown_classes=unknown,
            empty_classes=tuple(classnames[label] for label in np.flatnonzero(counts == 0)),
            problems=dict(problems),
            unreadable=tuple(image for part in parts for image in part.unreadable),
            passed_over=passed_over,
        )

    @property
    def has_defects(self) -> bool:
        """Whether images are missing or left out."""
        return bool(self.unknown_classes or self.problems)

    def describe(self) -> list[str]:
        """Return a line for each kind of defect, with counts and the first examples."""
        lines = []
        if self.unknown_classes:
            counts = [f"{name}: {count}" for name, count in self.unknown_classes.items()]
            lines.append(
                f"images of classes that are not among the {self.num_classes} of the list: "
                f"{self.unknown_classes.total()} ({_first(counts)}), first "
                f"{next(iter(self.unknown_classes.examples.values()))}"
            )
        if self.empty_classes:
            lines.append(
                f"classes without an image: {len(self.empty_classes)} of {self.num_classes} "
                f"({_first(self.empty_classes)})"
            )
        for cause, names in self.problems.items():
            lines.append(f"{explain(cause)}: {len(names)} ({_first(names)})")
        if self.unreadable:
            lines.append(describe_unreadable(self.unreadable))
        return lines + [f"passed over: {line}" for line in self.passed_over.describe()]


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
    if not needs_classes:
        return [""], [], ClassLabels(_NO_CLASSES, 1)
    names = _read_lines(folder / _CLASSNAMES)
    return names, _read_lines(folder / _TEMPLATES), ClassLabels({}, len(names))


def open_parts(folder: Path, classes: ClassLabels, split: str) -> tuple[list[LabelledPart], Layout]:
    """Index all tars or folders, in order; only names, offsets and classes are read.

    Args:
        folder: A folder in one of the forms above.
        classes: The result of :func:`read_classes`.
        split: The folder of tars that is preferred to ``test``.

    Raises:
        ValueError: naming ``eval.data``: the folder has an unknown form.
        OSError: when the file system does not answer.
    """
    has_classes = classes.ids != _NO_CLASSES
    layout = find_parts(folder, classes.ids if has_classes else {}, split)

    def open_part(path: Path) -> LabelledPart:
        if not layout.tars:
            return ClassFolder(path, classes)
        return LabelledTar(
            path,
            classes,
            class_id=(path.stem if layout.are_classes else None) if has_classes else "",
            num_samples=layout.num_samples.get(path),
        )

    paths = layout.tars or layout.folders
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        parts = pool.map(open_part, paths)
        what = f"opening {folder.name}"
        return list(progress(parts, what, len(paths), delay=2, leave=False, disable=None)), layout


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(
            f"eval.data ({path.parent}) must hold a readable {path.name}, or come with a list of "
            "classes"
        )
    try:
        return read_list(path)
    except ValueError as error:
        raise ValueError(f"eval.data ({path.parent}): {error}") from error


def _first(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NUM_EXAMPLES else ""
    return ", ".join(map(printable, names[:_NUM_EXAMPLES])) + more

"""Where the images of a held-out folder lie, and what the folder promises of them."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_linclip.data.folder_files import is_hidden
from ds_linclip.data.tar_index import IMAGE_SUFFIXES
from ds_linclip.process.text_files import read_text

__all__ = ["Layout", "find_parts"]

#: Descriptions of what is wrong, by cause.
Problems = dict[str, list[str]]

_COUNT = "nshards.txt"
_SYNSET = re.compile(r"n\d{8}")  # WordNet's ids
#: Tars that are compressed, unfinished or copies: "0.tar.gz", "0.tgz", "0.tar.part", "0.tar.1".
_NO_TAR = re.compile(
    r".*\.(tar\.(gz|bz2|xz|zst|lz4|z|part|partial|tmp|incomplete|download|crdownload|\d+)"
    r"|tgz|tbz2?|txz|tzst)",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|id|idation)?(?![a-z])")
#: A name with a number at its end: "0", "val-00", "val-00-of-10".
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})(?:-of-([0-9]{1,9}))?")
#: A copy that a file manager or a browser made: "0 (1)", "0 - Copy", "0 copy 2".
_COPY = re.compile(r"(?: - copy| copy)(?: \d+| \(\d+\))?$| ?\(\d+\)$", re.IGNORECASE)
_MAX_GAP = 100_000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a held-out folder: tars, or else folders of classes.

    Attributes:
        tars: In the order of their numbers, or names.
        folders: In the order of their names.
        are_classes: Whether tars are named by classes.
        num_samples: What a ``_stats.json`` beside a tar, or ``sizes.json``, says of it.
        problems: What the names show: tars that are missing (``shard_missing``), repeated
            (``shard_repeated``), fewer or more than promised (``shard_count``), compressed or
            unfinished (``shard_extension``); images beside the folders of the classes
            (``image_outside_class``).
    """

    tars: Sequence[Path] = ()
    folders: Sequence[Path] = ()
    are_classes: bool = False
    num_samples: Mapping[Path, int] = field(default_factory=dict)
    problems: Problems = field(default_factory=dict)


def find_parts(folder: Path, ids: Mapping[str, int], split: str) -> Layout:
    """Find the tars of a folder, or its folders of classes.

    Args:
        folder: A held-out folder.
        ids: The known classes; without any, only tars are looked for.
        split: The folder of tars that is preferred to ``test``; tars in ``folder`` itself are
            preferred to both.

    Raises:
        ValueError: naming ``eval.data``, which has no images or has them in several places.
        OSError: when the file system does not answer.
    """
    folders, files = _entries(folder)
    places = {folder: files}
    for place in dict.fromkeys((folder / split, folder / "test")):
        if place.name in folders:
            places[place] = _entries(place)[1]
    with_tars = [place for place, names in places.items() if any(map(_is_tar, names))]
    if not with_tars:
        return _class_folders(folder, folders, files, ids)
    place = with_tars[0]
    if place == folder:
        others = [*with_tars[1:], *(folder / name for name in folders if name in ids)]
        if others:
            raise ValueError(
                f"eval.data ({folder}) must hold images in one place: there are tars in it and "
                f"images in {others[0]}"
            )
    elif place.name != split and folder / split in places:
        raise ValueError(f"eval.data ({folder}): {folder / split} must hold tars; it has none")
    return _tars(folder, place, places[place], ids)


def _tars(folder: Path, place: Path, files: Sequence[str], ids: Mapping[str, int]) -> Layout:
    names = sorted(filter(_is_tar, files), key=lambda name: (len(name), name))
    stems = [name[: -len(".tar")] for name in names]
    are_classes = any(stem in ids or (ids and _SYNSET.fullmatch(stem)) for stem in stems)
    try:
        num_samples = _promised_samples(place, names, set(files))
        num_tars = _promised_tars(place / _COUNT) if _COUNT in files else None
    except ValueError as error:
        raise ValueError(f"eval.data ({folder}): {error}") from error
    problems = {
        "shard_extension": [str(place / name) for name in files if _NO_TAR.fullmatch(name)],
    }
    if not are_classes:
        _require_one_split(folder, names)
        problems |= _number_problems(place, stems, num_tars)
    return Layout(
        tars=[place / name for name in names],
        are_classes=are_classes,
        num_samples=num_samples,
        problems={cause: found for cause, found in problems.items() if found},
    )


def _class_folders(
    folder: Path,
    folders: Sequence[str],
    files: Sequence[str],
    ids: Mapping[str, int],
) -> Layout:
    loose = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not folders or not ids or (loose and not any(name in ids for name in folders)):
        form = ", or one with a folder of images for each class" if ids else ""
        raise ValueError(
            f"eval.data ({folder}) must be a folder with tars in it or in its test folder{form}"
            f"{_hint(folder, folders, files, ids)}"
        )
    if not any(name in ids for name in folders) and (hint := _hint(folder, folders, [], ids)):
        raise ValueError(f"eval.data ({folder}) must be the folder of the classes{hint}")
    return Layout(
        folders=[folder / name for name in folders],
        problems={"image_outside_class": [str(folder / name) for name in loose]} if loose else {},
    )


def _hint(
    folder: Path, folders: Sequence[str], files: Sequence[str], ids: Mapping[str, int]
) -> str:
    """Return where images lie instead, for a message; empty when nothing is found."""
    if archives := [name for name in files if _NO_TAR.fullmatch(name)]:
        return f"; {folder / archives[0]} is compressed or unfinished"
    inside = {name: _entries(folder / name) for name in folders}
    if above := [name for name, (below, _) in inside.items() if not ids.keys().isdisjoint(below)]:
        return f"; folders of classes are in {' and '.join(str(folder / name) for name in above)}"
    for name, (_, tars) in inside.items():
        if found := [tar for tar in tars if _is_tar(tar) or _NO_TAR.fullmatch(tar)]:
            return f"; there is {folder / name / min(found)}"
    return ""


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of folders and of files, in order, without hidden ones."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                is_folder = entry.is_dir() and not _is_tar(entry.name)
                (folders if is_folder else files).append(entry.name)
    return sorted(folders), sorted(files)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _require_one_split(folder: Path, names: Sequence[str]) -> None:
    """Check that tars named by splits, such as "val-0.tar", are all of one split."""
    by_split = {found[1]: name for name in names if (found := _SPLIT.search(name.lower()))}
    if len(by_split) > 1:
        both = " and ".join(by_split.values())
        raise ValueError(f"eval.data ({folder}) must hold tars of one split, not {both}")


def _promised_tars(path: Path) -> int:
    content = read_text(path).strip()
    if not re.fullmatch(r"[0-9]{1,9}", content):
        raise ValueError(f"{path} ({content[:40]!r}) must hold the number of tars")
    return int(content)


def _number_problems(place: Path, stems: Sequence[str], promised: int | None) -> Problems:
    """Describe tars that are missing or repeated, by the numbers at the ends of their names and by
    the promised number of tars."""
    sequences: dict[str, dict[int, str]] = defaultdict(dict)  # text before it -> number -> name
    repeated, totals = [], set()
    for stem in stems:
        original = _COPY.sub("", stem)
        if original != stem and original in stems:
            repeated.append(f"{place}/{original}.tar and {stem}.tar")
        elif found := _NUMBERED.fullmatch(stem):
            before, digits, total = found.groups()
            if (twin := sequences[before].setdefault(int(digits), stem)) != stem:
                repeated.append(f"{place}/{twin}.tar and {stem}.tar")
            totals.add(total)
    missing = [f"{place}/{name}.tar" for sequence in sequences.values() for name in _gaps(sequence)]
    if promised is None and len(sequences) == len(totals) == 1:
        promised = next((int(total) for total in totals if total), None)
    is_other = promised is not None and promised != len(stems)
    count = f"{place} promises {promised} tars and has {len(stems)}"
    return {
        "shard_missing": missing,
        "shard_repeated": repeated,
        "shard_count": [count] if is_other else [],
    }


def _gaps(sequence: Mapping[int, str]) -> Iterator[str]:
    """Yield the names that are missing between the first and the last number; numbers that are far
    apart, such as dates, are no sequence."""
    first, last = min(sequence), max(sequence)
    if last - first < _MAX_GAP and (first <= 1 or 2 * len(sequence) > last - first):
        found = _NUMBERED.fullmatch(sequence[first])
        assert found is not None
        start, end = found.span(2)
        for number in range(first, last):
            if number not in sequence:
                yield f"{found[0][:start]}{number:0{end - start}}{found[0][end:]}"


def _promised_samples(place: Path, names: Sequence[str], files: set[str]) -> dict[Path, int]:
    """Return what ``sizes.json`` and img2dataset's ``_stats.json`` say of tars."""
    promised = {}
    sizes = _read_json(place / "sizes.json") if "sizes.json" in files else {}
    for name in names:
        count, stats = sizes.get(name), f"{name[: -len('.tar')]}_stats.json"
        if stats in files:
            count = _read_json(place / stats).get("successes")
        if isinstance(count, int):
            promised[place / name] = count
    return promised


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be readable JSON: {error}") from error
    return content if isinstance(content, dict) else {}

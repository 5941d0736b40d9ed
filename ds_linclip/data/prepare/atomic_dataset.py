"""Data sets that are written once, and complete or not at all."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ds_linclip.process.atomic import atomic_directory

__all__ = ["write_once"]

_RECORD = "dataset.json"


def write_once(out: Path, record: Mapping[str, object], write: Callable[[Path], None]) -> bool:
    """Write a data set into a new folder, unless the folder holds the same data set already.

    Args:
        out: A folder that does not exist, is empty, or holds the same data set.
        record: The parameters of the data set, stored in ``dataset.json``.
        write: Fills the folder that it is given; that folder is renamed to ``out`` at the end.

    Returns:
        Whether the data set was written; False when ``out`` held it already.

    Raises:
        ValueError: when ``out`` holds anything else.
        OSError: when the folder cannot be written.
    """
    if _holds(out, record):
        return False
    try:
        with atomic_directory(out) as folder:
            write(folder)
            (folder / _RECORD).write_text(json.dumps(record, indent=4) + "\n")
    except OSError:
        if _holds(out, record):  # another process has written it in the meantime
            return False
        raise
    return True


def _holds(out: Path, record: Mapping[str, object]) -> bool:
    """Return whether ``out`` holds the data set; False when it is missing or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"out ({out}) must be empty or hold a complete data set") from error
    if found != record:
        raise ValueError(f"out ({out}) must be empty: it holds {found}, not {record}")
    return True

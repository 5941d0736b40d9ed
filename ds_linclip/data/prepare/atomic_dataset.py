"""A data set is whole or not there, and written once."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["Record", "write_once"]

Record = dict[str, str | int | None]

_RECORD = "dataset.json"
_MAY_BE_ZERO = ("seed", "num_test", "shuffle_seed")


def write_once(out: Path, record: Record, write: Callable[[Path], None]) -> bool:
    """Run ``write`` on a folder beside ``out`` and rename it, unless the same set is there.

    Args:
        out: Folder that does not exist yet, is empty, or holds the same set.
        record: Tells sets apart; numbers must be positive, some may be 0.
        write: Fills the folder it is given.

    Returns:
        Whether it was written; False: the same set was there already.

    Raises:
        ValueError: for a number that is too small, or when ``out`` holds anything else.
    """
    for name, value in record.items():
        if isinstance(value, int) and value < (0 if name in _MAY_BE_ZERO else 1):
            raise ValueError(f"{name} ({value}) is too small")
    if _holds(out, record):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(partial)
        (partial / _RECORD).write_text(json.dumps(record, indent=4) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(out)
        except OSError:
            # Another run was faster, or a file was put there meanwhile.
            if _holds(out, record):
                return False
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _holds(out: Path, record: Record) -> bool:
    """Whether ``out`` holds the set; False when there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"out ({out}) must be empty or hold a complete data set") from error
    if found != record:
        raise ValueError(f"out ({out}) must be empty: it holds {found}, asked for is {record}")
    return True

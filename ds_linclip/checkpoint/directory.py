"""The folder of a run's checkpoints: listing, pruning and setting aside; imports no torch."""

import itertools
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_linclip.process.atomic import write_atomically

__all__ = [
    "BestRecord",
    "checkpoint_path",
    "committed",
    "prune",
    "read_best",
    "remove_leftovers",
    "set_aside",
    "step_of",
    "write_best",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BestRecord:
    """The content of ``best.json``: a checkpoint, and the score that it is the best by."""

    checkpoint: str  #: The name of its folder.
    metric: str
    value: float


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` optimizer steps."""
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first.

    Raises:
        ValueError: when the folder cannot be read.
    """
    try:
        found = [p for p in directory.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"checkpoints ({directory}) cannot be read: {error}") from error
    return sorted(found, key=step_of)


def prune(directory: Path, *, keep_last: int, keep_every_steps: int) -> None:
    """Remove all checkpoints but the last ones and those at multiples of ``keep_every_steps`` (0:
    none) and the best one; one that cannot be removed is logged and stays."""
    best = read_best(directory)
    for path in committed(directory)[:-keep_last]:
        if best is not None and path.name == best.checkpoint:
            continue
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        try:  # renamed first, so that a checkpoint is never seen incomplete
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        except OSError as error:
            logger.warning("old checkpoint not removed: %s", error)


def read_best(directory: Path) -> BestRecord | None:
    """Return which checkpoint is the best; None when there is no record, or the checkpoint of the
    record is gone.

    Raises:
        ValueError: when the record cannot be read.
    """
    path = directory / "best.json"
    try:
        best = BestRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return best if (directory / best.checkpoint).is_dir() else None


def write_best(directory: Path, best: BestRecord) -> None:
    """Record which checkpoint is the best.

    Raises:
        OSError: when the record cannot be written.
    """
    write_atomically(directory / "best.json", json.dumps(asdict(best), indent=1), durable=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what interrupted saves and removals have left: folders, and files of ``latest``."""
    for path in directory.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(directory: Path, newer_than: Path) -> None:
    """Rename checkpoints newer than the one resumed from to ``step-N.rejected``."""
    for path in committed(directory):
        if step_of(path) > step_of(newer_than):
            rejected = path.with_suffix(".rejected")
            names = (rejected.with_name(f"{rejected.name}-{n}") for n in itertools.count(2))
            path.rename(next(p for p in itertools.chain([rejected], names) if not p.exists()))


def step_of(path: Path) -> int:
    """Return the number of optimizer steps done when a committed checkpoint was saved."""
    return int(path.name.removeprefix("step-"))

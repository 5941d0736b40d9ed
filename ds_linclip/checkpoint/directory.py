"""The folder of a run's checkpoints: listing, pruning and setting aside; imports no torch."""

import itertools
import logging
import re
import shutil
from pathlib import Path

__all__ = ["checkpoint_path", "committed", "prune", "remove_leftovers", "set_aside", "step_of"]

logger = logging.getLogger(__name__)


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
    none); one that cannot be removed is logged and stays."""
    for path in committed(directory)[:-keep_last]:
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        try:  # renamed first, so that a checkpoint is never seen incomplete
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        except OSError as error:
            logger.warning("old checkpoint not removed: %s", error)


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

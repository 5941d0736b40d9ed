"""``linclip runs``: run folders in a table."""

import argparse
import fcntl
import json
import os
import struct
import time
from pathlib import Path

from ds_linclip.config import load_config
from ds_linclip.resilience.restart_policy import newest_step

__all__ = ["run"]

_COLUMNS = ("run", "state", "step", "of", "loss", "score", "saved", "last sign of life")
#: struct flock of Linux on 64-bit machines: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


def run(options: argparse.Namespace) -> None:
    """Print a row for every run folder among the folders of a command line, or in them.

    Raises:
        ValueError: when a folder is missing or holds no run.
    """
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for folder in options.folders or [Path("runs")]:
        if not folder.is_dir():
            raise ValueError(f"folder ({folder}) does not exist")
        found = [folder, *sorted(folder.iterdir())]
        runs = [each for each in found if (each / "starts.jsonl").is_file()]
        if not runs:
            raise ValueError(f"folder ({folder}) holds no run folder")
        rows += [_row(each) for each in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(folder: Path) -> tuple[str, ...]:
    try:
        steps = load_config(folder / "config.yaml").train.steps
    except ValueError:  # written by another version
        steps = None
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    try:
        records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
    except json.JSONDecodeError as error:
        raise ValueError(f"{metrics} is damaged: {error}") from error
    trained = [record for record in records if "train/loss" in record]
    scores = [(tag, value) for record in records for tag, value in record.items() if "top1" in tag]
    step = trained[-1]["step"] if trained else 0
    if _is_locked(folder / "lock"):
        state = "running"
    else:
        state = "finished" if steps is not None and step >= steps else "stopped"
    return (
        folder.resolve().name,
        state,
        f"{step}",
        f"{steps or '?'}",
        f"{trained[-1]['train/loss']:.4f}" if trained else "-",
        f"{scores[-1][0].removeprefix('eval/')} {scores[-1][1]:.4f}" if scores else "-",
        f"{newest_step(folder) or '-'}",
        _ago(time.time() - metrics.stat().st_mtime) if metrics.exists() else "-",
    )


def _is_locked(path: Path) -> bool:
    """Return whether another process, of any host, holds the record lock of a run."""
    if not path.exists():
        return False
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("rb") as file:
        try:
            found = fcntl.fcntl(file, fcntl.F_GETLK, wanted)
        except OSError:  # a file system without locks
            return False
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

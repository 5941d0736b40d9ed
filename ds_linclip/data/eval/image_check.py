"""Decoding every held-out image once, before training depends on them."""

import json
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ds_linclip.data.eval.dataset import LabelledData
from ds_linclip.data.eval.unreadable import UnreadableImage
from ds_linclip.process.atomic import write_atomically
from ds_linclip.process.consensus import AgreedError, from_first_rank, map_over_ranks
from ds_linclip.process.progress import progress

__all__ = ["check_images"]

#: Images that one process decodes in a round: some twenty seconds of work.
_IMAGES_PER_ROUND = 2000

_Unreadable = list[UnreadableImage]


def check_images(
    data: LabelledData,
    *,
    group: ProcessGroup | None,
    result: Path,
    on_round: Callable[[], None] = lambda: None,
) -> None:
    """Check that every image can be decoded; all ranks of ``group`` divide the work.

    Args:
        data: The images, the same on every rank.
        result: A file for the result, which holds until a file of the set changes.
        on_round: Called about every half minute, on all ranks together.

    Raises:
        AgreedError: on all ranks, when more images than the set allows cannot be decoded, or when
            the set cannot be read or the result not be kept.
    """
    files = from_first_rank(partial(_version, data), group)
    unreadable = from_first_rank(partial(_load, result, files), group)
    if unreadable is None:
        unreadable = _decode(data, group, on_round)
        facts = {"files": files, "images": data.num_samples, "unreadable": unreadable}
        from_first_rank(partial(_keep, result, facts), group)
    try:
        data.require_readable(unreadable)
    except ValueError as error:
        raise AgreedError(f"{error}; all are in {result}") from error


def _decode(
    data: LabelledData, group: ProcessGroup | None, on_round: Callable[[], None]
) -> _Unreadable:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    size = world_size * max(1, data.num_workers) * max(1, _IMAGES_PER_ROUND // data.batch_size)
    found: list[_Unreadable] = []
    bar = progress(
        desc="checking held-out images",
        total=data.num_batches,
        unit="batch",
        delay=5,
        leave=False,
        disable=rank > 0,
    )
    with bar:
        for start in range(0, data.num_batches, size):
            on_round()
            numbers = range(start, min(start + size, data.num_batches))
            found += map_over_ranks(data.unreadable_images, numbers, group)
            bar.update(len(numbers))
    return list(chain(*found))


def _version(data: LabelledData) -> dict[str, str]:
    """Return what changes with any file of the set, or with its place."""
    try:
        return {"folder": str(data.folder.resolve()), "version": data.files_version}
    except OSError as error:
        raise ValueError(f"eval.data ({data.folder}) must be readable: {error}") from error


def _load(result: Path, files: dict[str, str]) -> _Unreadable | None:
    """Return a result that was kept for these files, or None."""
    try:
        kept = json.loads(result.read_text())
        if kept["files"] != files:
            return None
        return [UnreadableImage(*fields) for fields in kept["unreadable"]]
    except (OSError, ValueError, LookupError, TypeError):  # none, cut off, or of another version
        return None


def _keep(result: Path, facts: dict[str, Any]) -> None:
    try:
        write_atomically(result, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{result} cannot be written: {error}") from error

"""Errors of one rank, raised on all: nobody waits for a rank that is gone."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["check_alike", "from_first_rank", "on_all_ranks"]

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Run ``work`` on every rank of ``group``; return its result once all have theirs.

    Args:
        work: Must not communicate over ``group``.
        group: None: this process alone.

    Raises:
        ValueError: on every rank, when it was raised on one, which is named.
        OSError: likewise.
    """
    if group is None:
        return work()
    problem: ValueError | OSError | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = error
    problems: list[ValueError | OSError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem and _plain(problem), group=group)
    for rank, found in enumerate(problems):
        if found is not None:
            raise type(found)(f"data-parallel rank {rank}: {found}") from problem
    return result


def check_alike(value: str, what: str, group: ProcessGroup | None) -> None:
    """Check that all ranks of ``group`` have the same.

    Raises:
        ValueError: on every rank, naming the first that has something else.
    """
    values = [value] if group is None else [""] * dist.get_world_size(group)
    if group is not None:
        dist.all_gather_object(values, value, group=group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"{what} of data-parallel rank {rank} must be those of rank 0")


def from_first_rank(value: T, group: ProcessGroup | None) -> T:
    """What the first rank of ``group`` has, which can be pickled."""
    received = [value]
    if group is not None:
        dist.broadcast_object_list(received, group_src=0, group=group)
    return received[0]


def _plain(problem: ValueError | OSError) -> ValueError | OSError:
    """Without traceback and fields that may not be pickled."""
    return (OSError if isinstance(problem, OSError) else ValueError)(str(problem))

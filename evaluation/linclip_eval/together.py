"""Errors of one rank, raised on all: nobody waits for a rank that is gone."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["on_all_ranks"]

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


def _plain(problem: ValueError | OSError) -> ValueError | OSError:
    """Without traceback and fields that may not be pickled."""
    return (OSError if isinstance(problem, OSError) else ValueError)(str(problem))

"""Agreement over ranks: an error of one rank is raised on all, so that none waits for a rank that
is gone.

In all functions here ``group`` is the process group whose ranks call together, or None for this
process alone; what travels between ranks must be picklable.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ds_linclip.process.progress import progress

__all__ = [
    "AgreedCrash",
    "AgreedError",
    "agree",
    "from_first_rank",
    "gather",
    "map_over_ranks",
    "require_equal",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")


class AgreedError(ValueError):
    """A user's error that every rank knows of and raises at the same point."""


class AgreedCrash(RuntimeError):
    """Any other error of one rank that every rank knows of and raises at the same point."""


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """Return the value of every rank of ``group``, in rank order, on every rank."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(
    work: Callable[[], T],
    group: ProcessGroup | None,
    errors: tuple[type[Exception], ...] = (ValueError,),
) -> T:
    """Run ``work`` on every rank of ``group``; if it fails on one, raise its error on all.

    Args:
        work: Returns this rank's result; must not communicate over ``group``.
        errors: The exceptions that are shared. Any other one is a bug and ends its own rank.

    Returns:
        This rank's own result.

    Raises:
        AgreedError: with the message of the lowest failing rank, naming the failing ranks unless
            all of them failed.
        AgreedCrash: likewise, when its error is neither a ValueError nor an OSError; the rank logs
            the traceback.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except errors as error:
        failure = error
    kind: type[Exception] = AgreedError
    message = str(failure)
    if failure is not None and not isinstance(failure, ValueError | OSError):
        kind = AgreedCrash
        if not isinstance(failure, AgreedCrash):
            logger.error("this rank failed", exc_info=failure)
            message = f"{type(failure).__name__}: {failure}"
    outcomes = gather(None if failure is None else (kind, message), group)
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return cast(T, result)
    where = ""
    if len(failed) < len(outcomes):
        ranks = ", ".join(map(str, failed))
        where = f" (on rank{'s' if len(failed) > 1 else ''} {ranks} of {len(outcomes)})"
    kind, message = cast(tuple[type[Exception], str], outcomes[failed[0]])
    raise kind(f"{message}{where}") from failure


def from_first_rank(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Run ``work`` on the first rank of ``group`` and return its result on every rank.

    Raises:
        AgreedError: on every rank, when ``work`` raised ValueError.
    """
    is_first = group is None or dist.get_rank(group) == 0
    received = [agree(lambda: work() if is_first else None, group)]
    if group is not None and dist.get_world_size(group) > 1:
        dist.broadcast_object_list(received, group_src=0, group=group)
    return cast(T, received[0])


def require_equal(value: object, name: str, group: ProcessGroup | None) -> None:
    """Check that every rank of ``group`` has the same value.

    Raises:
        AgreedError: on every rank, naming the first rank that has another value.
    """
    for rank, other in enumerate(values := gather(value, group)):
        if other != values[0]:
            raise AgreedError(f"{name} of rank {rank} must be those of rank 0")


def map_over_ranks(
    work: Callable[[Sequence[Item]], Iterable[T]],
    items: Sequence[Item],
    group: ProcessGroup | None,
    *,
    title: str | None = None,
) -> list[T]:
    """Divide items among the ranks of ``group`` and return the results of all on every rank.

    Args:
        work: Yields one result for each of the items it is given; must not communicate over
            ``group``.
        items: The same on every rank; item i goes to rank i modulo the number of ranks.
        title: Title of a progress bar, which the first rank shows after five seconds; None: no bar.

    Returns:
        The results, in the order of the items.

    Raises:
        AgreedError: on every rank, when ``work`` raised ValueError or OSError on one of them.
        AgreedCrash: on every rank, when it raised another exception.
    """
    rank = 0 if group is None else dist.get_rank(group)
    world_size = 1 if group is None else dist.get_world_size(group)
    own = items[rank::world_size]
    hidden = title is None or rank > 0

    def results() -> list[T]:
        return list(progress(work(own), title, len(own), delay=5, leave=False, disable=hidden))

    shares = gather(agree(results, group, (Exception,)), group)
    return [shares[i % world_size][i // world_size] for i in range(len(items))]

"""A map over processes that keeps the order of its items and bounds how many are in flight."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from ds_linclip.process.parent_death import end_with_parent

__all__ = ["num_usable_cores", "ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 4


def num_usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Generator[Result, None, None]:
    """Yield the result of every item, in the order of the items.

    At most four items per worker are in flight, so that neither items nor results fill the memory.
    Closing the generator ends the processes.

    Args:
        function: Maps an item to its result; all three can be pickled.
        items: The items, taken as results are consumed.
        num_workers: The number of processes; with 1, this process does the work itself.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    # Forks of a process that runs threads can hang, and spawned ones would import torch each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_linclip.data"])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == _IN_FLIGHT_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

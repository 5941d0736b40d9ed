"""Many processes, one result: a map over processes that keeps the order and bounds what waits."""

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

_AHEAD = 4  # items in flight per worker


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Generator[Result, None, None]:
    """Results in the order of the items, whatever the number of processes.

    At most a few items per worker are in flight, so neither waiting items nor results fill the
    memory. Close the iterator to end the processes early.

    Args:
        function: Can be pickled, as can items and results.
        items: Taken as results are.
        num_workers: Processes; 1: all happens in this one.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    # Forks of a process that runs threads can hang, and spawned ones would import torch each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_linclip.data"])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == _AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the parent alone ends the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

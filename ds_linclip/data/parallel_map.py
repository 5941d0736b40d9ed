"""A map over processes that keeps the order of its items and bounds how many are in flight."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ds_linclip.process.parent_death import end_with_parent

__all__ = ["ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    prefetch_factor: int = 2,
) -> Generator[Result, None, None]:
    """Yield the result of every item, in the order of the items; workers end with the iterator.

    Args:
        function: Maps an item to its result.
        items: The items, taken as results are consumed.
        num_workers: The number of processes; with 0, this process does the work itself.
        prefetch_factor: The number of items per worker that are in flight.

    Raises:
        OSError, ValueError: as the function raised it; other errors as torch's DataLoader reports
            them, with the worker's traceback as their message.
        RuntimeError: when a worker was killed.
    """
    loader = DataLoader(
        _Results(function),
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=torch.cuda.is_initialized(),  # not in a CPU run on a machine with GPUs
        worker_init_fn=_start_worker,
        # Without its own generator the loader draws a seed from the global one.
        generator=torch.Generator(),
    )
    # Signals wait until the workers ignore them: until then they would end with a traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with _sigchld_untouched():
            results = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    yield from map(_raised, _received(results))  # keeps no result: its memory would stay in use


def _received(results: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            yield next(results)
        except StopIteration:
            return
        except (OSError, EOFError) as error:  # those of the function arrive as values
            raise RuntimeError(
                f"a data worker is gone, perhaps killed for its memory: {error}"
            ) from error


@contextmanager
def _sigchld_untouched() -> Iterator[None]:
    """Restore the handler of SIGCHLD after this context.

    The DataLoader sets one that raises an error for a dead worker wherever the main thread is, in
    the middle of a collective, say. Without it the error comes with the next result.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


@dataclass(frozen=True)
class _Results(Dataset[Any]):
    function: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except (OSError, ValueError) as error:
            # As a value: if raised, it would arrive with a traceback as its message.
            error.add_note(traceback.format_exc())
            return error


def _raised(result: Any) -> Any:
    if isinstance(result, (OSError, ValueError)):
        raise result
    return result


def _start_worker(_worker: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    # Only the first process handles signals: training needs its workers to finish and save a step
    # after SIGTERM. It ends them itself.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(process: int) -> None:
    """Exit on SIGTERM from that process, and ignore it from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)

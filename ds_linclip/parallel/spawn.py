"""Ranks on this machine without a launcher, for tests and measurements; they start in a second."""

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from ds_linclip.process.parent_death import end_with_parent

__all__ = ["run_ranks"]


def run_ranks(world_size: int, fn: Callable[..., object], *arguments: Any) -> None:
    """Run ``fn(*arguments)`` in several processes that can join one process group.

    They are forks of a server that has imported everything; each uses one thread. If one fails, the
    others are killed. ``fn`` is a function of a module; it and its arguments must be picklable.

    Raises:
        RuntimeError: when a rank fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ds_linclip.trainer"])
    ranks = [
        server.Process(target=_rank, args=(rank, world_size, port, fn, *arguments))
        for rank in range(world_size)
    ]
    try:
        for each in ranks:
            each.start()
        waiting = list(ranks)
        while waiting:
            multiprocessing.connection.wait([each.sentinel for each in waiting])
            waiting = [each for each in waiting if each.is_alive()]
            if any(each.exitcode for each in ranks):
                raise RuntimeError(f"{fn.__name__}: a rank of {world_size} failed")
    finally:
        for each in ranks:
            if each.pid is not None:
                each.kill()


def _rank(
    rank: int, world_size: int, port: int, fn: Callable[..., object], *arguments: Any
) -> None:
    end_with_parent()
    gc.freeze()  # excludes what the server has imported from collections
    multiprocessing.set_start_method(None, force=True)  # data workers start as in any process
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    fn(*arguments)

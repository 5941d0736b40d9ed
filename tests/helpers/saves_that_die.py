"""Ranks that kill themselves at a chosen call of their second save."""

import json
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from ds_linclip.checkpoint.writer import CheckpointWriter
from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.trainer import train

#: Calls of C functions by which a save reaches the disk and the other ranks.
_NAMES = {
    *("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "flush"),
    *("allgather", "wait"),
}


def calls_of_second_save(config: Config) -> list[list[str]]:
    """Return for both ranks the names of the calls of their second save."""
    run_ranks(2, _train, config, None, -1)
    return [json.loads((config.run_dir / f"calls-{rank}.json").read_text()) for rank in (0, 1)]


def die_in_second_save(config: Config, rank: int, call: int) -> None:
    """Train on two ranks and kill ``rank`` when it is about to make that call."""
    try:
        run_ranks(2, _train, config, rank, call)
    except RuntimeError:
        return
    raise AssertionError(f"rank {rank} survives call {call} of its second save")


def _train(config: Config, doomed: int | None, moment: int) -> None:
    mesh = Mesh.create(config.parallel)
    calls: list[str] = []
    saves = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal saves
        if threading.current_thread().name != "checkpoint":
            return
        saves += event == "call" and frame.f_code is CheckpointWriter._run.__code__
        if saves != 2 or event != "c_call" or function.__name__ not in _NAMES:
            return
        if mesh.rank == doomed and len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(function.__name__)

    threading.setprofile(watch)
    train(config, mesh)
    (Path(config.run_dir) / f"calls-{mesh.rank}.json").write_text(json.dumps(calls))
    mesh.close()

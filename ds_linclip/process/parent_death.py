"""Processes that end with the one that started them."""

import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["end_with_launcher", "end_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_BETWEEN_LOOKS = 0.5
#: Commands, and packages of modules, that start launchers of ranks.
_RUNNERS = ("deepspeed", "linclip", "linclip_launch")


def end_with_parent() -> None:
    """Kill this process (SIGKILL) when the process that started it ends, however that ends.

    A launcher that is killed cannot end its ranks: they would continue, or wait for each other
    permanently, and hold their GPUs. SIGKILL also ends a process that hangs in a collective, and
    checkpoints are written atomically. Data workers of a rank call this too and end with it.

    The kernel watches the parent, on Linux only: more exactly the thread that started this process,
    which must live as long as its process. A child of a multiprocessing fork server ends with the
    process that requested it, which a thread watches, since the server lives as long as its
    children. A parent that ended before the call is not noticed.

    Raises:
        OSError: when the kernel refuses.
    """
    requester = multiprocessing.parent_process()
    if requester is not None and requester.pid != os.getppid():
        threading.Thread(target=_end_after, args=(requester.sentinel,), daemon=True).start()
        return
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it ended during this call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """End this rank with the launcher that started it, and with the command that a user started.

    The rank's parent is its launcher: when that ends, the rank is killed (:func:`end_with_parent`).
    The launcher is often a child of another process, ``deepspeed`` or ``linclip train``, that may
    be killed without it. Then the rank gets SIGTERM, at which training saves and leaves.

    Raises:
        OSError: when the kernel refuses.
    """
    end_with_parent()
    launchers = psutil.Process().parents()  # none for the first process of a container
    for process in itertools.takewhile(_is_runner, launchers[1:]):
        threading.Thread(target=_terminate_after, args=(process,), daemon=True).start()


def _is_runner(process: psutil.Process) -> bool:
    """Return whether a process is a command or module of :data:`_RUNNERS`."""
    command = _command(process)
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    names = [*(Path(word).name for word in command[:2]), *(name.split(".")[0] for name in module)]
    return any(name in _RUNNERS for name in names)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _terminate_after(process: psutil.Process) -> None:
    """Send SIGTERM to this process once another one, which need not be its parent, has ended."""
    with suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)

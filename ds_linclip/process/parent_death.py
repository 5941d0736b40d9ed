"""Processes that end with the one that started them."""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)

"""Processes that do not outlive the one that started them."""

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
    """Have this process killed when the one that has asked for it ends, however that ends.

    A launcher that is killed cannot end its ranks: they would go on, or wait for each other for
    ever, and hold their GPUs. SIGKILL also ends a process that hangs in a collective, and what
    training saves is whole or not there. Nobody else need do anything: a rank's data workers, which
    call this too, follow it.

    Children of a multiprocessing fork server are not the server's but their user's: a thread waits
    for the end of that one, since the server itself lasts as long as they do. Otherwise the kernel
    watches the parent, on Linux, and only there: more exactly the thread that has started this
    process, which must last as long as its process. A parent that ended before the call is not
    noticed.

    Raises:
        OSError: when the kernel refuses.
    """
    user = multiprocessing.parent_process()
    if user is not None and user.pid != os.getppid():
        threading.Thread(target=_end_after, args=(user.sentinel,), daemon=True).start()
        return
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)

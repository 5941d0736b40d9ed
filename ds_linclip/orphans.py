"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends; Linux only.

    A launcher that is killed cannot end its ranks: they would go on, or wait for each other for
    ever, and hold their GPUs. SIGKILL also ends a process that hangs in a collective, and what
    training saves is whole or not there. Nobody else need do anything: a rank's data workers, which
    call this too, follow it.

    The kernel watches the thread that started the process: call this in children of threads that
    last as long as their process. It is not inherited. A parent that ended before the call is not
    noticed, unless init has taken its place.

    Raises:
        OSError: when the kernel refuses.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)

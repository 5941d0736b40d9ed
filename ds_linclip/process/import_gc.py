"""Faster start and end of processes that load torch, DeepSpeed and Megatron-core."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_paused"]


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector while modules are imported, and exempt them from it afterwards.

    Modules are a million objects that live as long as the process. Collecting among them again and
    again took a third of a rank's start and end, and would slow down every full collection later.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()

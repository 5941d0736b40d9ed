"""Quicker starts and ends of processes that load torch, DeepSpeed and Megatron-core."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_start"]


@contextmanager
def quick_start() -> Iterator[None]:
    """Load modules in this context: the garbage collector leaves alone what they are made of.

    They are a million objects that live as long as the process. Looking through them over and over
    took a third of a rank's start and end, and takes time of every full collection in between.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()

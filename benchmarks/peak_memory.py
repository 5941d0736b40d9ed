"""Peak memory of a piece of work, on a GPU or of this process."""

import ctypes
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Most memory in use since construction, beyond what was in use then.

    On a GPU that of torch's allocator, otherwise the resident set of this process.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Reuse of memory that is free but held would not show in the resident set.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # restarts the peak resident set
        self._before = self._peak()

    def growth(self) -> int:
        """Return the bytes in use at the fullest moment since construction, less those before."""
        return self._peak() - self._before

    def _peak(self) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

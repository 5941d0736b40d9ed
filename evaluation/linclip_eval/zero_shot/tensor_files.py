"""Tensors in files, from which an interrupted evaluation resumes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_linclip.process.atomic import atomic_file

__all__ = ["load_tensors", "save_tensors"]


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file on the CPU, or None if the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically; their folder is created when missing.

    Raises:
        OSError: when the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        save_file({name: each.contiguous() for name, each in tensors.items()}, partial)

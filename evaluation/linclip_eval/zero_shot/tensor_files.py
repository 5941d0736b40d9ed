"""Tensors in files, from which an interrupted evaluation resumes."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_linclip.process.atomic import atomic_file

__all__ = ["load_tensor", "save_tensor"]


def load_tensor(path: Path) -> Tensor | None:
    """Return the tensor of a file on the CPU, or None if the file is missing or damaged."""
    try:
        return load_file(path)["tensor"]
    except (OSError, SafetensorError, KeyError):
        return None


def save_tensor(path: Path, tensor: Tensor) -> None:
    """Write a tensor atomically; its folder is created when missing.

    Raises:
        OSError: when the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        save_file({"tensor": tensor.contiguous()}, partial)

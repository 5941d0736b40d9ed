"""Loading the model of a checkpoint without an engine, and checking a checkpoint's files."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ds_linclip.checkpoint.directory import committed
from ds_linclip.checkpoint.sharded_safetensors import CheckpointReader, sha256_of
from ds_linclip.config import load_config
from ds_linclip.loss.grad_cache import bounded_log_scale
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.progress import progress

__all__ = ["as_used", "check_files", "latest_checkpoint", "load_weights", "weight_kind"]


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run folder.

    Raises:
        ValueError: when the folder holds none.
    """
    found = committed(run_dir / "checkpoints")
    if not found:
        raise ValueError(f"run folder ({run_dir}) holds no checkpoint")
    return found[-1]


def load_weights(checkpoint: Path, mesh: Mesh) -> CLIP:
    """Return the model of a checkpoint of any layout in fp32, split by the mesh's tensor axis, with
    averaged weights if there are any.

    Raises:
        ValueError: when a file is missing or differs from the manifest.
    """
    files = CheckpointReader(checkpoint)
    check_files(files)
    config = load_config(checkpoint / "config.yaml")
    model = CLIP(config.model, mesh, loss=config.loss.kind)
    tp = mesh.tp
    with torch.no_grad():
        for name, p in model.named_parameters():
            place = {"tp_rank": tp.rank, "tp_size": tp.size, "start": 0, "numel": p.numel()}
            p.copy_(as_used(name, files.read(name, weight_kind(files, name), **place)).view_as(p))
    return model


def as_used(name: str, weight: Tensor) -> Tensor:
    """Return a saved parameter as the loss used it: the logit scale within its bounds."""
    return bounded_log_scale(weight) if name == "logit_scale" else weight


def weight_kind(files: CheckpointReader, name: str) -> str:
    """Return the kind of a parameter that evaluation uses: its running average if there is one."""
    return "ema" if "ema" in files.kinds(name) else "weight"


def check_files(
    files: CheckpointReader, names: Collection[str] | None = None, *, show_progress: bool = True
) -> None:
    """Check files of a checkpoint, by default all, against its manifest; if that takes seconds,
    show a progress bar.

    Raises:
        ValueError: naming the first file that differs, and what to do.
    """
    listed = files.manifest["files"]
    names = listed if names is None else names
    if unknown := sorted(set(names) - set(listed)):
        raise ValueError(f"checkpoint ({files.path}): {unknown[0]} is not in its list of files")
    for name in names:
        if problem := _size_problem(files.path / name, listed[name]["size"]):
            raise _mismatch(files.path / name, listed[name]["sha256"], problem)
    size = sum(listed[name]["size"] for name in names)
    style = {"desc": "checksums", "unit": "B", "unit_scale": True, "delay": 2, "leave": False}
    with progress(total=size, disable=not show_progress, **style) as bar:
        for name in names:
            if sha256_of(files.path / name, bar.update) != listed[name]["sha256"]:
                raise _mismatch(files.path / name, listed[name]["sha256"], "its content differs")


def _size_problem(path: Path, expected: int) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"it cannot be read, {error.strerror}"
    return None if size == expected else f"it has {size} bytes instead of {expected}"


def _mismatch(path: Path, sha256: str, problem: str) -> ValueError:
    return ValueError(
        f"checkpoint ({path}) does not match its checksum (sha256 {sha256[:12]}...): {problem}; "
        "take an older checkpoint, or restore the file"
    )

"""The model of a checkpoint, for those who do not train."""

from collections.abc import Collection
from pathlib import Path

import torch
from tqdm import tqdm

from ds_linclip.checkpoint.directory import committed
from ds_linclip.checkpoint.sharded_safetensors import ShardFiles, sha256_of
from ds_linclip.config import load_config
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["check_files", "latest_checkpoint", "load_weights", "weight_kind"]


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run folder.

    Raises:
        ValueError: when the folder holds none.
    """
    found = committed(run_dir / "checkpoints")
    if not found:
        raise ValueError(f"run folder ({run_dir}) holds no checkpoint")
    return found[-1]


def load_weights(checkpoint: Path, mesh: Mesh) -> CLIP:
    """The model of a checkpoint as evaluation sees it, in fp32, whatever the layout that saved it.

    Raises:
        ValueError: when a file is missing or not what the manifest says.
    """
    files = ShardFiles(checkpoint)
    check_files(files)
    config = load_config(checkpoint / "config.yaml")
    model = CLIP(config.model, mesh, loss=config.loss.kind)
    tp = mesh.tp
    with torch.no_grad():
        for name, p in model.named_parameters():
            place = {"tp_rank": tp.rank, "tp_size": tp.size, "start": 0, "numel": p.numel()}
            p.copy_(files.read(name, weight_kind(files, name), **place).view_as(p))
    return model


def weight_kind(files: ShardFiles, name: str) -> str:
    """What of a parameter evaluation sees: its running average, where there is one."""
    return "ema" if "ema" in files.kinds(name) else "weight"


def check_files(files: ShardFiles, names: Collection[str] | None = None) -> None:
    """Check files of a checkpoint against its manifest; what takes seconds shows its progress.

    Args:
        files: The checkpoint.
        names: Those to check; None: all.

    Raises:
        ValueError: naming the first one that differs, and what to do.
    """
    listed = files.manifest["files"]
    names = listed if names is None else names
    if unknown := sorted(set(names) - set(listed)):
        raise ValueError(f"checkpoint ({files.path}): {unknown[0]} is not in its list of files")
    for name in names:
        if problem := _size_problem(files.path / name, listed[name]["size"]):
            raise _mismatch(files.path / name, listed[name]["sha256"], problem)
    size = sum(listed[name]["size"] for name in names)
    with tqdm(
        desc="checksums", total=size, unit="B", unit_scale=True, delay=2, leave=False
    ) as progress:
        for name in names:
            if sha256_of(files.path / name, progress.update) != listed[name]["sha256"]:
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

"""Checkpoints that are either whole or not there.

DeepSpeed writes its shards into ``step-N.tmp``, and the model as evaluation sees it goes beside
them in open_clip's form. Every file is then synced and hashed, the list of hashes becomes
``manifest.json``, and only a rename makes the folder a checkpoint. ``latest`` is replaced last. On
resume the manifest is verified before anything is loaded.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_linclip.config import Config
from ds_linclip.model import CLIP
from ds_linclip.model.open_clip_exchange import export_folder, load_folder
from ds_linclip.parallel.ema import add_ema_to_universal
from ds_linclip.parallel.engine import Engine
from ds_linclip.parallel.mesh import AgreedError, Mesh
from ds_linclip.parallel.universal import write_universal

__all__ = ["CheckpointStore", "latest_checkpoint", "load_weights", "weights_folder"]

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
#: Folder within a checkpoint: the model in open_clip's form.
_WEIGHTS = "open_clip"


class CheckpointStore:
    """The checkpoints of one run folder; every method is called by all ranks together.

    Args:
        config: the run's.
        mesh: the ranks that save and load.
        data_identity: what fixes the data, by name in messages.

    A checkpoint belongs to its run: what fixes the weights after a step (model, optimizer,
    schedule, batch, order of the data) must be what it was, or it is refused. The number of
    data-parallel ranks may change: the checkpoint is then converted as it is loaded.
    """

    def __init__(self, config: Config, mesh: Mesh, data_identity: Mapping[str, Any]) -> None:
        self.directory = config.run_dir / "checkpoints"
        self._config = config
        self._mesh = mesh
        identity = {
            "parallel.tp": mesh.tp.size,
            "parallel.pp": mesh.pp.size,
            "zero.stage": config.zero.stage,
            "loss.kind": config.loss.kind,
            **data_identity,
            **_flatten(asdict(config.train), "train"),
            **_flatten(asdict(config.optim), "optim"),
            **_flatten(asdict(config.model), "model"),
            **{f"init.{k}": v for k, v in asdict(config.init).items() if k.startswith("lock_")},
        }
        self._identity = json.loads(json.dumps(identity))  # as it will be read back

    def save(self, engine: Engine, step: int, data_state: Mapping[str, Any]) -> Path:
        """Save engine state as ``step-N`` and drop all but the newest ``checkpoint.keep_last``.

        Args:
            engine: The run's.
            step: optimizer steps done.
            data_state: what :meth:`load` gives back; small, plain data, the same on all ranks.

        Raises:
            OSError: when a file cannot be written or read back; older checkpoints stay.
        """
        final = self.directory / f"step-{step:08d}"
        staging = final.with_suffix(".tmp")
        if self._mesh.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self._mesh.barrier()
        engine.save(self.directory, staging.name)
        with engine.evaluation_model() as model:
            export_folder(model, staging / _WEIGHTS)
        names = self._mesh.from_rank_zero(lambda: _files_in(staging))
        hashes = self._hash_together(staging, names)
        unreadable = [name for name, digest in hashes.items() if digest is None]
        if unreadable:
            raise OSError(f"{staging / unreadable[0]} was saved but cannot be read: not committed")
        if self._mesh.rank == 0:
            facts = {
                "step": step,
                "dp_size": self._mesh.replicas.size,
                "run": self._identity,
                "data": data_state,
                "files": hashes,
            }
            _write_synced(staging / _MANIFEST, json.dumps(facts, indent=1))
            for folder in (staging / _WEIGHTS, staging):
                _sync_directory(folder)
            staging.rename(final)
            _write_synced(self.directory / "latest.tmp", final.name)
            os.replace(self.directory / "latest.tmp", self.directory / "latest")
            _sync_directory(self.directory)
            for old in _committed(self.directory)[: -self._config.checkpoint.keep_last]:
                _remove(old)
        self._mesh.barrier()
        return final

    def newest(self) -> Path | None:
        """The newest valid checkpoint of the run folder; None when it holds none.

        Raises:
            AgreedError: when checkpoints are there but none is valid, when the newest was made by
                another model, layout or data, or when ``checkpoint.resume`` is ``never``.
        """
        candidates = self._mesh.from_rank_zero(lambda: _committed(self.directory))
        if not candidates:
            return None
        if self._config.checkpoint.resume == "never":
            raise AgreedError(
                f"checkpoint.resume (never) refuses {self.directory}, which holds "
                f"{candidates[-1].name}: choose another name or output_dir"
            )
        problems = []
        for path in reversed(candidates):
            problem = self._problem_of(path)
            if problem is None:
                self._mesh.agree(partial(self._check_same_run, path))
                return path
            problems.append(problem)
            if self._mesh.rank == 0:
                logger.warning("checkpoint rejected: %s", problem)
        raise AgreedError(
            f"{self.directory} holds no valid checkpoint ({'; '.join(problems)}): restore one, or "
            "choose another name to start from scratch"
        )

    def is_from_other_ranks(self, path: Path) -> bool:
        """Whether another number of data-parallel ranks saved the checkpoint."""
        return self._mesh.from_rank_zero(
            lambda: _read_manifest(path)["dp_size"] != self._mesh.replicas.size
        )

    def load(self, engine: Engine, path: Path) -> tuple[int, dict[str, Any]]:
        """Load a checkpoint that :meth:`newest` chose; returns its step and data state.

        The engine must have been told to load the universal form if :meth:`is_from_other_ranks`.
        Newer folders, all rejected by :meth:`newest`, are set aside as ``step-N.rejected``.
        """
        folder = self.directory
        if self.is_from_other_ranks(path):
            folder = path.with_suffix(".universal")
            self._mesh.agree(partial(self._convert, path, folder), errors=(OSError,))
        step = engine.load(folder, path.name)
        self._mesh.barrier()
        if self._mesh.rank == 0:
            shutil.rmtree(path.with_suffix(".universal"), ignore_errors=True)
            for newer in _committed(self.directory):
                if newer.name > path.name:
                    newer.rename(_free_name(newer.with_suffix(".rejected")))
        return step, self._mesh.from_rank_zero(lambda: _read_manifest(path)["data"])

    def _convert(self, path: Path, folder: Path) -> None:
        if self._mesh.rank == 0:
            theirs = _read_manifest(path)["dp_size"]
            logger.info("%s: from %d ranks to %d", path.name, theirs, self._mesh.replicas.size)
            shutil.rmtree(folder, ignore_errors=True)
            write_universal(path, folder)
            add_ema_to_universal(path, folder / path.name)

    def _problem_of(self, path: Path) -> str | None:
        """What makes the checkpoint unusable, in words; the same answer on all ranks."""
        try:
            expected = self._mesh.from_rank_zero(lambda: _read_manifest(path)["files"])
        except ValueError as error:
            return str(error)
        found = self._hash_together(path, sorted(expected))
        for name, digest in expected.items():
            if found[name] != digest:
                return f"{path / name} does not match its checksum (sha256 {digest[:12]}...)"
        return None

    def _check_same_run(self, path: Path) -> None:
        manifest = _read_manifest(path)
        theirs, ranks = manifest["run"], manifest["dp_size"]
        differences = [
            f"{name} ({value}) must equal {theirs.get(name)}"
            for name, value in self._identity.items()
            if theirs.get(name) != value
        ]
        if differences:
            raise ValueError(f"to resume from {path}, {', '.join(differences)}")
        tp, replicas = self._mesh.tp.size, self._mesh.replicas.size
        fixed = []
        if tp > 1 and self._config.zero.stage == 3:
            fixed.append(f"zero.stage (3) with parallel.tp ({tp})")
        if self._config.optim.kind == "lion":
            fixed.append("the state of optim.kind (lion)")
        if ranks != replicas and fixed:
            raise ValueError(
                f"to resume from {path}, data x context ranks ({replicas}) must equal {ranks}: "
                f"DeepSpeed cannot convert {' and '.join(fixed)}"
            )

    def _hash_together(self, folder: Path, names: list[str]) -> dict[str, str | None]:
        """SHA-256 by file name, the files shared out over the ranks."""
        share = names[self._mesh.rank :: self._mesh.world_size]
        mine = {name: _synced_sha256(folder / name) for name in share}
        everyone: list[dict[str, str | None]] = [{}] * self._mesh.world_size
        dist.all_gather_object(everyone, mine)
        return {name: digest for share in everyone for name, digest in share.items()}


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run folder.

    Raises:
        ValueError: when the folder holds none.
    """
    committed = _committed(run_dir / "checkpoints")
    if not committed:
        raise ValueError(f"run folder ({run_dir}) holds no checkpoint")
    return committed[-1]


def weights_folder(checkpoint: Path) -> Path:
    """The hub folder with the weights as evaluation saw them."""
    return checkpoint / _WEIGHTS


def load_weights(checkpoint: Path, mesh: Mesh) -> CLIP:
    """The model of a checkpoint as evaluation saw it, whatever the layout of the ranks that saved.

    Raises:
        ValueError: when a file is missing or not what the manifest says.
    """
    folder = weights_folder(checkpoint)
    files = _read_manifest(checkpoint)["files"]
    for path in (checkpoint / name for name in files if Path(name).parent == Path(_WEIGHTS)):
        if _synced_sha256(path) != files[str(path.relative_to(checkpoint))]:
            raise ValueError(f"checkpoint ({path}) does not match its checksum")
    return load_folder(folder, mesh)


def _files_in(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths)


def _committed(directory: Path) -> list[Path]:
    """Checkpoint folders that were committed, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if re.fullmatch(r"step-\d{8}", p.name))


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away: first from the list, then from the disk. Training goes on if not."""
    try:
        doomed = checkpoint.rename(checkpoint.with_suffix(".tmp"))
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("old checkpoint not removed: %s", error)


def _free_name(path: Path) -> Path:
    """The path itself, or with the first number that makes it new."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / _MANIFEST
    try:
        content = json.loads(manifest.read_text())
        return {key: content[key] for key in ("step", "dp_size", "run", "data", "files")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat


def _synced_sha256(path: Path) -> str | None:
    """Hash of the file once it has reached the disk; None when it cannot be read."""
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

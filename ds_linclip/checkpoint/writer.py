"""Writing one checkpoint while training continues.

Commit protocol: every rank copies its state to the host, writes its file into ``step-N.tmp`` and
waits for the disk. If that succeeded on all ranks, rank 0 checks that every file is there and every
parameter complete, writes the manifest, renames the folder and replaces ``latest``. A folder that
was not renamed is not a checkpoint.
"""

import logging
import math
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_linclip.checkpoint.directory import checkpoint_path, prune
from ds_linclip.checkpoint.sharded_safetensors import (
    FileRecord,
    StoredPiece,
    sha256_of,
    write_manifest,
    write_shard,
)
from ds_linclip.config import Config, save_config
from ds_linclip.engine.zero_state import RankState
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.atomic import sync, write_atomically
from ds_linclip.process.consensus import AgreedError, agree, gather

__all__ = ["CheckpointWriter"]

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own.

    Attributes:
        failure: Why the last save has failed, as far as this rank knows; None: it has not.
    """

    def __init__(self, directory: Path, config: Config, mesh: Mesh) -> None:
        self._directory = directory
        self._config = config
        self._mesh = mesh
        self._file_name = f"rank-{mesh.rank:05d}.safetensors"
        self._group = mesh.new_cpu_group()
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self.failure: str | None = None

    def start(self, state: RankState, step: int, facts: Mapping[str, Any]) -> None:
        """Copy this rank's state to the host and start to write it; ``facts`` go to the manifest.

        The copies stay allocated for the next save: as much host memory as the state takes.
        """
        assert self._thread is None
        pieces = []
        for piece in (each for each in state.pieces() if each.is_saved_here):
            stored = StoredPiece(
                name=piece.name,
                shape=piece.shape,
                split_dim=piece.split_dim,
                tp_rank=0 if piece.split_dim is None else self._mesh.tp.rank,
                start=piece.start,
                numel=piece.numel,
                kinds=list(piece.tensors),
                file=self._file_name,
            )
            pieces.append(stored)
            for kind, tensor in piece.tensors.items():
                self._copy(f"{kind}/{piece.name}", tensor)
        if self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.failure = None
        self._thread = threading.Thread(
            target=self._run, args=(step, facts, pieces), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the last save; return why it failed, the same on all ranks, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.failure

    def _copy(self, name: str, tensor: Tensor) -> None:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            is_pinned = self._mesh.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
            self._buffers[name] = buffer
        buffer.copy_(tensor, non_blocking=True)

    def _run(self, step: int, facts: Mapping[str, Any], pieces: list[StoredPiece]) -> None:
        failure: str | None = "the thread that saves has failed"  # replaced unless there is a bug
        try:
            self._write(step, facts, pieces)
            failure = None
        except AgreedError as error:
            failure = str(error)
        except RuntimeError as error:  # of the connections: another rank is gone
            failure = f"the ranks lost each other: {error}"
        finally:
            self.failure = failure

    def _write(self, step: int, facts: Mapping[str, Any], pieces: list[StoredPiece]) -> None:
        started = time.perf_counter()
        final = checkpoint_path(self._directory, step)
        staging = final.with_suffix(".tmp")

        def write() -> FileRecord:
            staging.mkdir(parents=True, exist_ok=True)
            return write_shard(staging / self._file_name, self._buffers)

        def commit() -> None:
            if self._mesh.rank == 0:
                files = {name: file for name, file, _ in ranks}
                seconds = round(time.perf_counter() - started, 3)
                manifest = {**facts, "files": files, "seconds": seconds}
                saved = [piece for *_, of_rank in ranks for piece in of_rank]
                self._commit(staging, final, manifest, saved)

        try:
            file = agree(write, self._group, errors=(OSError,))
            ranks = gather((self._file_name, file, pieces), self._group)
            agree(commit, self._group, errors=(OSError, ValueError, AssertionError))
        except AgreedError:
            if self._mesh.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _commit(
        self, staging: Path, final: Path, manifest: dict[str, Any], pieces: Sequence[StoredPiece]
    ) -> None:
        """Turn the folder that all ranks have written into a checkpoint."""
        _check_complete(pieces, self._mesh.tp.size)
        for name, file in manifest["files"].items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != file["size"]:
                raise OSError(
                    f"{path} was written by its rank but rank 0 does not see all of it: "
                    f"output_dir ({self._config.output_dir}) must be on storage shared by all nodes"
                )
        config = staging / "config.yaml"
        save_config(self._config, config)
        sync(config)
        record = {"size": config.stat().st_size, "sha256": sha256_of(config)}
        manifest["files"][config.name] = record
        write_manifest(staging, manifest, pieces)
        staging.rename(final)
        sync(self._directory)
        kept = self._config.checkpoint
        try:
            write_atomically(self._directory / "latest", final.name, durable=True)
            prune(self._directory, keep_last=kept.keep_last, keep_every_steps=kept.keep_every_steps)
        except (OSError, ValueError) as error:
            logger.warning("%s is saved, but what follows a save failed: %s", final, error)


def _check_complete(pieces: Sequence[StoredPiece], tp_size: int) -> None:
    """Check that all elements of every parameter are saved, and none of them twice."""
    saved: dict[str, list[StoredPiece]] = defaultdict(list)
    for piece in pieces:
        saved[piece.name].append(piece)
    for name, parts in saved.items():
        for tp_rank in range(1 if parts[0].split_dim is None else tp_size):
            end = 0
            for part in sorted((p for p in parts if p.tp_rank == tp_rank), key=lambda p: p.start):
                assert part.start == end, f"{name}: elements {end} to {part.start} on {tp_rank}"
                end += part.numel
            assert end == math.prod(parts[0].shape), f"{name}: {end} elements on {tp_rank}"

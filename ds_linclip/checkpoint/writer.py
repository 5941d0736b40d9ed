"""Saving one checkpoint while training goes on.

Commit protocol: every rank copies its state to the host, writes its file into ``step-N.tmp`` and
waits for the disk; all ranks tell each other how it went; if all is well rank 0 checks that every
file is there and every parameter complete, writes the manifest, renames the folder and replaces
``latest``. Whatever is interrupted in between is not a checkpoint.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_linclip.checkpoint.directory import checkpoint_path, prune
from ds_linclip.checkpoint.sharded_safetensors import (
    FileFacts,
    PieceFacts,
    sha256_of,
    sync_directory,
    write_manifest,
    write_shard,
    write_synced,
)
from ds_linclip.config import Config, save_config
from ds_linclip.engine.zero_state import StateShards
from ds_linclip.parallel.mesh import Mesh

__all__ = ["CheckpointWriter", "shard_name"]

logger = logging.getLogger(__name__)


def shard_name(rank: int) -> str:
    """File of a rank within a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own.

    Args:
        directory: The folder of all checkpoints.
        config: The run's; written beside the shards.
        mesh: The ranks that save.
    """

    def __init__(self, directory: Path, config: Config, mesh: Mesh) -> None:
        self._directory = directory
        self._config = config
        self._mesh = mesh
        # Its own connections: what training sends at the same time does not meet it.
        self._group = dist.new_group(backend="gloo") if mesh.world_size > 1 else None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the save that :meth:`start` began last is known to have failed."""
        return self._failure is not None

    def start(self, shards: StateShards, step: int, facts: Mapping[str, Any]) -> None:
        """Copy this rank's state to the host and begin to write it.

        The copies are kept for the next save: as much memory on the host as the state has.

        Args:
            shards: What this rank holds.
            step: Optimizer steps done.
            facts: What the manifest holds besides.
        """
        assert self._thread is None
        pieces = []
        for piece in shards.held():
            if piece.is_saved_here:
                pieces.append(
                    PieceFacts(
                        name=piece.name,
                        shape=piece.shape,
                        split_dim=piece.split_dim,
                        tp_rank=0 if piece.split_dim is None else self._mesh.tp.rank,
                        start=piece.start,
                        numel=piece.numel,
                        kinds=list(piece.tensors),
                        file=shard_name(self._mesh.rank),
                    )
                )
                for kind, tensor in piece.tensors.items():
                    self._copy(f"{kind}/{piece.name}", tensor)
        self._copy("rng/cpu", torch.get_rng_state())
        if self._mesh.device.type == "cuda":
            self._copy("rng/cuda", torch.cuda.get_rng_state())
            torch.cuda.current_stream().synchronize()
        self._failure = None
        self._thread = threading.Thread(
            target=self._run, args=(step, dict(facts), pieces), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the save that was begun; the same words on all ranks if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._failure

    def _copy(self, name: str, tensor: Tensor) -> None:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            is_pinned = self._mesh.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
            self._buffers[name] = buffer
        buffer.copy_(tensor, non_blocking=True)

    def _run(self, step: int, facts: dict[str, Any], pieces: list[PieceFacts]) -> None:
        problem: str | None = "the thread that saves has failed"  # unless it says otherwise
        try:
            problem = self._write(step, facts, pieces)
        except RuntimeError as error:  # the connections: another rank has gone
            problem = f"the ranks lost each other: {error}"
        finally:
            self._failure = problem

    def _write(self, step: int, facts: dict[str, Any], pieces: list[PieceFacts]) -> str | None:
        begun = time.perf_counter()
        final = checkpoint_path(self._directory, step)
        staging = final.with_suffix(".tmp")
        name = shard_name(self._mesh.rank)
        written: FileFacts | None = None
        problem: str | None = None
        try:
            staging.mkdir(parents=True, exist_ok=True)
            written = write_shard(staging / name, self._buffers)
        except OSError as error:
            problem = str(error)
        ranks = self._gather((problem, written, pieces))
        problem = _first_problem([rank[0] for rank in ranks])
        if self._mesh.rank == 0:
            if problem is None:
                facts["files"] = {
                    shard_name(rank): asdict(found)
                    for rank, (_, found, _) in enumerate(ranks)
                    if found
                }
                facts["seconds"] = round(time.perf_counter() - begun, 3)
                everything = [piece for _, _, of_rank in ranks for piece in of_rank]
                try:
                    self._commit(staging, final, facts, everything)
                except (OSError, ValueError, AssertionError) as error:
                    problem = str(error)  # the other ranks wait for an answer
            if problem is not None:
                shutil.rmtree(staging, ignore_errors=True)
        (problem, *_) = self._gather(problem)
        return problem

    def _commit(
        self, staging: Path, final: Path, facts: dict[str, Any], pieces: Sequence[PieceFacts]
    ) -> None:
        """Rank 0, when every rank has written: make a checkpoint of the folder."""
        _check_complete(pieces, self._mesh.tp.size)
        for name, found in facts["files"].items():
            if not (staging / name).is_file() or (staging / name).stat().st_size != found["size"]:
                raise OSError(
                    f"{staging / name} was written by its rank but is not whole for rank 0: "
                    f"output_dir ({self._config.output_dir}) must be on storage shared by all nodes"
                )
        config = staging / "config.yaml"
        save_config(self._config, config)
        facts["files"][config.name] = asdict(_facts_of(config))
        write_manifest(staging, facts, pieces)
        sync_directory(staging)
        staging.rename(final)
        sync_directory(self._directory)
        kept = self._config.checkpoint
        newest = self._directory / "latest.tmp"
        try:
            write_synced(newest, final.name)
            os.replace(newest, self._directory / "latest")
            sync_directory(self._directory)
            prune(self._directory, keep_last=kept.keep_last, keep_every_steps=kept.keep_every_steps)
        except (OSError, ValueError) as error:
            logger.warning("%s is saved, but what follows a save failed: %s", final, error)

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self._mesh.world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values


def _first_problem(problems: Sequence[str | None]) -> str | None:
    found = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if not found:
        return None
    rank, text = found[0]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{text} (rank {rank}{others} of {len(problems)})"


def _check_complete(pieces: Sequence[PieceFacts], tp_size: int) -> None:
    """An invariant of the layout: nothing of a parameter is left out or saved twice."""
    saved: dict[str, list[PieceFacts]] = defaultdict(list)
    for piece in pieces:
        saved[piece.name].append(piece)
    for name, parts in saved.items():
        ranks = range(1 if parts[0].split_dim is None else tp_size)
        for tp_rank in ranks:
            end = 0
            for part in sorted((p for p in parts if p.tp_rank == tp_rank), key=lambda p: p.start):
                assert part.start == end, f"{name}: elements {end} to {part.start} on {tp_rank}"
                end += part.numel
            assert end == math.prod(parts[0].shape), f"{name}: {end} elements on {tp_rank}"


def _facts_of(path: Path) -> FileFacts:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    digest = sha256_of(path)
    assert digest is not None
    return FileFacts(path.stat().st_size, digest)

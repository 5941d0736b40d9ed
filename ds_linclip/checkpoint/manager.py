"""The checkpoints of one run: saving, choosing which one to resume from, loading."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_linclip.checkpoint.directory import checkpoint_path, committed, remove_leftovers, set_aside
from ds_linclip.checkpoint.finite_weights import check_finite
from ds_linclip.checkpoint.loading import check_files
from ds_linclip.checkpoint.sharded_safetensors import CheckpointReader, read_manifest
from ds_linclip.checkpoint.writer import CheckpointWriter
from ds_linclip.config import Config, DataConfig, ModelConfig, OptimConfig
from ds_linclip.engine.engine import Engine
from ds_linclip.engine.zero_state import ParameterPiece
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError

__all__ = ["CheckpointManager", "NotSaved"]

logger = logging.getLogger(__name__)

#: Settings of ``train`` that change how a step is computed but not its result.
_MAY_CHANGE = (
    *("micro_batch_size", "reduce_dtype", "activation_checkpointing", "compile", "cuda_graphs"),
)
#: Beginnings of the settings in which a branch may differ from the run that it begins with.
_MAY_BRANCH = ("optim.schedule.", "train.steps")
_VERSIONS = ("torch", "triton", "deepspeed", "megatron-core")


class NotSaved(AgreedError):
    """A save failed on one rank, and counts on none; older checkpoints stay."""


class CheckpointManager:
    """The checkpoints of one run folder; every method is a collective of all ranks.

    A checkpoint belongs to its run: what determines the weights after a step (model, optimizer,
    schedule, batch, order of the data) must be unchanged, or the checkpoint is refused. The layout
    (ranks on every axis, ZeRO stage) may change: every rank reads the pieces it needs, whichever
    rank saved them. ``data_identity`` has the settings that determine the order of the data, by
    their names.
    """

    def __init__(self, config: Config, mesh: Mesh, data_identity: Mapping[str, Any]) -> None:
        self.directory = config.run_dir / "checkpoints"
        self._config = config
        self._mesh = mesh
        train = {k: v for k, v in asdict(config.train).items() if k not in _MAY_CHANGE}
        identity = {
            "loss.kind": config.loss.kind,
            **data_identity,
            **_flatten(train, "train"),
            **_flatten(asdict(config.optim), "optim"),
            "optim.beta2": config.optim.betas[1],
            **_flatten(asdict(config.model), "model"),
            **{f"init.{k}": v for k, v in asdict(config.init).items() if k.startswith("lock_")},
        }
        self._identity = _as_read_back(identity)
        self._layout = {**mesh.axis_sizes, "zero": config.zero.stage}
        self._writer = CheckpointWriter(self.directory, config, mesh)
        self._last_step = -1
        self._saved_at = time.monotonic()

    @property
    def last(self) -> Path:
        """The path of the last saved checkpoint."""
        return checkpoint_path(self.directory, self._last_step)

    @property
    def has_failed(self) -> bool:
        """Whether the last save is known, on this rank, to have failed; if so, `wait` raises."""
        return self._writer.failure is not None

    def is_due_by_clock(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed since the last save or the last True.

        Only rank 0 reads its clock; on the other ranks the answer is False.
        """
        minutes = self._config.checkpoint.every_minutes
        now = time.monotonic()
        if self._mesh.rank != 0 or minutes == 0 or now - self._saved_at < 60 * minutes:
            return False
        self._saved_at = now
        return True

    def save(self, engine: Engine, step: int, data_state: Mapping[str, Any]) -> None:
        """Save the run as ``step-N``; with ``checkpoint.asynchronous``, only start to.

        ``data_state`` is small, plain data, the same on all ranks; :meth:`load` returns it.

        Raises:
            NotSaved: when this save or the previous one failed.
        """
        if step == self._last_step:
            return
        self.wait()
        facts = {
            "step": step,
            "layout": self._layout,
            "run": self._identity,
            "data": data_state,
            "state": engine.state.scalars(),
            "versions": {name: version(name) for name in _VERSIONS},
        }
        self._writer.start(engine.state, step, facts)
        self._last_step, self._saved_at = step, time.monotonic()
        if not self._config.checkpoint.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
            NotSaved: when it failed.
        """
        failure = self._writer.wait()
        if failure is not None:
            raise NotSaved(
                f"checkpoint {self.last} was not saved: {failure}; older ones are untouched: fix "
                "this and start again"
            )

    def close(self) -> None:
        """Wait for the last save, whether it succeeds or fails."""
        self._writer.wait()

    def newest(self) -> Path | None:
        """Return the newest valid checkpoint of the run folder, or else the one of another run that
        ``checkpoint.branch_from`` names; None when there is neither.

        Raises:
            AgreedError: when there are checkpoints but none is valid, when the newest was made with
                another model or data, or when ``checkpoint.resume`` is ``never``; without one of
                its own, likewise for ``checkpoint.branch_from``.
        """
        self.wait()
        candidates = self._mesh.from_rank_zero(lambda: committed(self.directory))
        if not candidates:
            return self._branch()
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

    def load(self, engine: Engine, path: Path) -> tuple[int, dict[str, Any]]:
        """Load a checkpoint returned by :meth:`newest`; return its step and data state.

        Newer folders, all rejected by :meth:`newest`, are renamed to ``step-N.rejected``.
        """
        manifest = self._mesh.from_rank_zero(lambda: read_manifest(path))
        files, tp = CheckpointReader(path, manifest), self._mesh.tp
        if self._mesh.rank == 0 and manifest["layout"] != self._layout:
            logger.info("%s: from %s to %s", path.name, manifest["layout"], self._layout)

        def read(piece: ParameterPiece, kind: str) -> Tensor:
            place = {"tp_rank": tp.rank, "tp_size": tp.size}
            return files.read(piece.name, kind, start=piece.start, numel=piece.numel, **place)

        kinds = {kind for name in files.names for kind in files.kinds(name)} - {"weight"}
        engine.load(read, sorted(kinds), manifest["state"])
        if self._mesh.rank == 0:
            set_aside(self.directory, newer_than=path)
        self._mesh.barrier()
        self._last_step = manifest["step"]
        return manifest["step"], manifest["data"]

    def remove_leftovers(self) -> None:
        """Remove what interrupted saves have left; call it before the first save."""
        if self._mesh.rank == 0:
            remove_leftovers(self.directory)
        self._mesh.barrier()

    def _problem_of(self, path: Path) -> str | None:
        """Return why the checkpoint is unusable, or None; every rank checks its share of files."""
        mesh = self._mesh
        try:
            reader = CheckpointReader(path, mesh.from_rank_zero(lambda: read_manifest(path)))
            share = sorted(reader.manifest["files"])[mesh.rank :: mesh.world_size]
            mesh.agree(partial(_check_share, reader, share, show_progress=mesh.rank == 0))
        except ValueError as error:
            return str(error)
        return None

    def _branch(self) -> Path | None:
        """Return the checkpoint of another run that this one begins with, if there is one."""
        given = self._config.checkpoint.branch_from
        if given is None:
            return None
        path, where = Path(given), f"checkpoint.branch_from ({given})"
        if problem := self._problem_of(path):
            raise AgreedError(f"{where} must be a valid checkpoint of another run: {problem}")

        def check() -> None:
            self._check_same_run(path, but=_MAY_BRANCH)
            done, steps = read_manifest(path)["step"], self._config.train.steps
            if done >= steps:
                raise ValueError(
                    f"train.steps ({steps}) must be greater than {done}, the step of {where}"
                )

        self._mesh.agree(check)
        return path

    def _check_same_run(self, path: Path, but: tuple[str, ...] = ()) -> None:
        # A setting that the checkpoint does not have came later: its default is how the run began.
        defaults = _as_read_back(
            _flatten(asdict(ModelConfig()), "model")
            | _flatten(asdict(OptimConfig()), "optim")
            | {"data.captions": DataConfig().captions}
        )
        theirs = defaults | read_manifest(path)["run"]
        differences = [
            f"{name} ({value}) must equal {theirs.get(name)}"
            for name, value in self._identity.items()
            if theirs.get(name) != value and not name.startswith(but)
        ]
        if differences:
            raise ValueError(
                f"to {'branch' if but else 'resume'} from {path}, {', '.join(differences)}"
            )


def _check_share(reader: CheckpointReader, names: Sequence[str], *, show_progress: bool) -> None:
    """Check that files are as the manifest says, and that weights and optimizer state are finite.

    Raises:
        ValueError: naming the file or the tensors that are not.
    """
    check_files(reader, names, show_progress=show_progress)
    try:
        weights = [name for name in names if name in reader.file_names]
        check_finite(pair for name in weights for pair in reader.tensors(name))
    except ValueError as error:
        raise ValueError(f"checkpoint ({reader.path}): {error}") from error


def _as_read_back(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat

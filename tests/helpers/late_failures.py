"""What fails on forked ranks after some steps: data, an evaluation, a log."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ds_linclip.config import Config
from ds_linclip.data import Batch, DataError, LabelledData, TrainData
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedCrash, AgreedError
from ds_linclip.resilience.divergence import Diverged
from ds_linclip.resilience.preemption import Preempted
from ds_linclip.trainer import train
from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator

__all__ = ["WHEN", "train_with"]

#: The step after which something fails.
WHEN = 3


def train_with(config: Config, failure: Callable[[Config, Mesh, int], None] | None) -> None:
    """Train; call ``failure`` after every step, and write how the run ended to ``end-N.json``.

    ``decoded`` there is the number of batches that this rank has decoded in the check of all
    held-out images.
    """
    mesh = Mesh.create(config.parallel)
    group = mesh.dp.group
    evaluator = HeldOutEvaluator.from_config(config, device=mesh.device, group=group)
    decoded: list[int] = []
    unreadable_in = LabelledData._unreadable_in

    def counted(data: LabelledData, number: int) -> Any:
        decoded.append(number)
        return unreadable_in(data, number)

    batches = TrainData.batches

    def watched(data: TrainData, start: int, *rest: Any) -> Iterator[Batch]:
        for step, batch in enumerate(batches(data, start, *rest), start=start):
            if failure is not None:
                failure(config, mesh, step)
            yield batch

    end = ["finished", ""]
    with (
        patch.object(LabelledData, "_unreadable_in", counted),
        patch.object(TrainData, "batches", watched),
    ):
        try:
            train(config, mesh, evaluator)
        except (AgreedError, AgreedCrash, Diverged, Preempted) as error:
            end = [type(error).__name__, str(error)]
    facts = {"kind": end[0], "message": end[1], "decoded": len(decoded)}
    (Path(config.output_dir) / f"end-{mesh.rank}.json").write_text(json.dumps(facts))
    mesh.barrier()
    mesh.close()


def preempted(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN - 2 and mesh.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # all ranks know of it one step later


def no_samples(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN and mesh.rank == 0:
        raise DataError("data.train (x.tar) cannot be read: Input/output error")


def dead_worker(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN and mesh.rank == mesh.dp.size - 1:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def held_out_gone(config: Config, mesh: Mesh, step: int) -> None:
    assert config.eval.data is not None
    if step == WHEN - 1 and mesh.rank == 0:
        shutil.rmtree(Path(config.eval.data, "test"))


def out_of_memory(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN - 1 and mesh.rank == 1:

        def encode_image(model: CLIP, images: Any) -> Any:
            raise MemoryError("too many images")

        patch.object(CLIP, "encode_image", encode_image).start()


def full_disk_of_metrics(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN - 1 and mesh.rank == 0:
        _fill(config.run_dir / "metrics.jsonl")


def full_disk_of_samples(config: Config, mesh: Mesh, step: int) -> None:
    if step == WHEN - 2 and mesh.rank == 1:  # all ranks know of it one step later
        _fill(config.run_dir / "samples" / "rank-00001.jsonl")


def _fill(path: Path) -> None:
    """Let every write to a log fail, as on a full disk."""
    path.rename(path.with_suffix(".before"))
    path.symlink_to("/dev/full")

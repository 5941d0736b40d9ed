"""Time-outs of process groups: all of them are longer than the watchdog's."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed import distributed_c10d

import linclip_launch.train
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config, WatchdogConfig
from ds_linclip.parallel.mesh import DEFAULT_TIMEOUT, Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.resilience.preemption import RequestReducer
from ds_linclip.resilience.watchdog import collective_timeout
from ds_linclip.trainer import TrainResult
from helpers import EMBEDDED
from helpers.not_finite_job import make_engine

WATCHDOG = 4000.0


def timeouts() -> list[float]:
    """Return the time-outs of this process's groups in seconds."""
    backends = (g._get_backend(torch.device("cpu")) for g in distributed_c10d._world.pg_map)
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_collective_timeout_exceeds_that_of_the_watchdog():
    assert collective_timeout(WatchdogConfig()) == timedelta(minutes=30)
    assert collective_timeout(WatchdogConfig(timeout_seconds=WATCHDOG)).total_seconds() == 4600
    assert collective_timeout(WatchdogConfig(timeout_seconds=0)) == DEFAULT_TIMEOUT


def test_mesh_sets_the_time_out_of_groups_that_exist():
    try:
        Mesh.create(timeout=timedelta(hours=3))
        assert set(timeouts()) == {3 * 3600.0}
    finally:
        Mesh.create()
    assert set(timeouts()) == {DEFAULT_TIMEOUT.total_seconds()}


def start_run(folder: Path, overrides: list[str]) -> None:
    """Run the training command of one rank up to its first step."""
    found: list[float] = []

    def build(config: Config, mesh: Mesh, *_: Any) -> TrainResult:
        found.extend(timeouts())  # before DeepSpeed's groups
        engine = make_engine(config, mesh)
        others = CheckpointManager(config, mesh, {}), RequestReducer(mesh)
        found.extend(timeouts())
        (folder / f"rank{mesh.rank}.json").write_text(json.dumps(found))
        del engine, others
        return TrainResult(steps=0)

    with (
        patch.object(linclip_launch.train, "train", build),
        patch.object(sys, "argv", ["train", str(EMBEDDED), *overrides]),
    ):
        assert linclip_launch.train.main() == 0


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [["parallel.pp=2"], ["zero.stage=3"]])
def test_every_group_of_a_run_outlasts_the_watchdog(layout, embedded_overrides, tmp_path):
    small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
    run = [f"output_dir={tmp_path}", "eval.data=null", f"watchdog.timeout_seconds={WATCHDOG}"]
    run_ranks(2, start_run, tmp_path, [*embedded_overrides, *small, *run, *layout])
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(found) > 20
        assert set(found) == {WATCHDOG + 600}

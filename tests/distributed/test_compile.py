"""Training under torch.compile, in every layout: the losses of an eager run, and whole graphs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ds_linclip.config import Config, load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.evaluators import Scores

pytestmark = pytest.mark.distributed

TOWERS = "train.compile=towers"


def job(config: Config, backend: str) -> None:
    """Train with another backend of torch.compile, and save what it did in every rank."""
    torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]
    mesh = Mesh.create(config.parallel)
    train(config, mesh, Scores(lambda model, writer, step: {}))
    found = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    (config.run_dir / f"compiled.{mesh.rank}").write_text(json.dumps(found))
    mesh.close()


@pytest.fixture
def run(embedded_overrides: list[str], tmp_path: Path) -> Any:
    def run(name: str, ranks: int, *more: str, backend: str = "aot_eager") -> tuple[Any, Any]:
        """Return the losses by step, and what torch.compile did in every rank."""
        base = [f"output_dir={tmp_path}", f"name={name}", "train.steps=3", "eval.data=null"]
        batch = ["train.global_batch_size=32", "data.num_workers=0", "checkpoint.every_steps=9"]
        log = ["log.every_steps=1", "log.tensorboard=false", "optim.warmup_steps=1"]
        small = ["model.vision.layers=2", embedded_overrides[0], "parallel.device=cpu"]
        config = load_config(EMBEDDED, [*base, *batch, *log, *small, *more])
        run_ranks(ranks, job, config, backend)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
        files = sorted(config.run_dir.glob("compiled.*"))
        return losses, [json.loads(file.read_text()) for file in files]

    return run


@pytest.mark.parametrize(
    ("ranks", "graphs", "more"),
    [
        # The towers and the loss.
        (1, 2, ["loss.kind=sigmoid", "train.activation_checkpointing=selective"]),
        (2, 2, ["zero.stage=2", "train.activation_checkpointing=full", "optim.ema_decay=0.9"]),
        (2, 2, ["parallel.tp=2"]),
        (2, 2, ["parallel.cp=2", "model.vision.patch_dropout=0.5"]),
        # The towers with gradients and without, and the loss.
        (1, 3, ["train.micro_batch_size=8"]),
    ],
)
def test_towers_and_loss_are_one_graph_each(run, ranks, graphs, more):
    losses, compiled = run("compiled", ranks, TOWERS, *more)
    assert losses == pytest.approx(run("eager", ranks, *more)[0], rel=1e-5)
    assert compiled == [{"graphs": graphs, "breaks": {}}] * ranks


def test_pipeline_stages_are_one_graph_each(run):
    more = ["parallel.pp=2", "train.micro_batch_size=16"]
    losses, compiled = run("compiled", 2, TOWERS, *more)
    assert losses == pytest.approx(run("eager", 2, *more)[0], rel=1e-5)
    assert [each["breaks"] for each in compiled] == [{}, {}]
    assert [each["graphs"] for each in compiled] == [2, 3]

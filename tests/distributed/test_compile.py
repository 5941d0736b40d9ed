"""Training under torch.compile, in every layout: the losses of an eager run, and whole graphs."""

import json
import logging
import shutil
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
    logging.disable(logging.NOTSET)  # run_ranks shows errors alone
    log = logging.getLogger("ds_linclip.trainer")
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(config.run_dir.parent / "log"))
    train(config, mesh, Scores(lambda model, writer, step: {}))
    found = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    (config.run_dir / f"compiled.{mesh.rank}").write_text(json.dumps(found))
    mesh.close()


@pytest.fixture(scope="module")
def run(embedded_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(
        ranks: int, *more: str, folder: Path | None = None, backend: str = "aot_eager"
    ) -> tuple[dict[int, float], list[dict[str, Any]]]:
        """Return the losses by step, and what torch.compile did in every rank."""
        folder = tmp_path_factory.mktemp("run") if folder is None else folder
        base = [f"output_dir={folder}", "name=compiled", "train.steps=3", "eval.data=null"]
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


@pytest.fixture(scope="module")
def eager(run: Any) -> dict[int, float]:
    losses: dict[int, float] = run(1)[0]
    return losses


@pytest.mark.parametrize(
    ("ranks", "graphs", "more"),
    [
        # The towers and the loss.
        (2, 2, ["zero.stage=2", "train.activation_checkpointing=full", "optim.ema_decay=0.9"]),
        (2, 2, ["parallel.tp=2", "train.activation_checkpointing=selective"]),
        pytest.param(2, 2, ["parallel.cp=2"], marks=pytest.mark.slow),
        # The towers with gradients and without, and the loss.
        (1, 3, ["train.micro_batch_size=8"]),
    ],
)
def test_towers_and_loss_are_one_graph_each(run, eager, ranks, graphs, more):
    losses, compiled = run(ranks, TOWERS, *more)
    assert losses == pytest.approx(eager, rel=1e-5)
    assert compiled == [{"graphs": graphs, "breaks": {}}] * ranks


@pytest.mark.slow
def test_parts_of_towers_are_one_graph_in_each_pipeline_stage(run, eager):
    losses, compiled = run(2, TOWERS, "parallel.pp=2", "train.micro_batch_size=16")
    assert losses == pytest.approx(eager, rel=1e-5)
    # With gradients and without, and the loss in the last stage.
    assert compiled == [{"graphs": 2, "breaks": {}}, {"graphs": 3, "breaks": {}}]


def test_layers_gathered_by_zero_3_break_the_graph_of_a_block_but_not_the_result(
    run, eager, tmp_path
):
    losses, compiled = run(2, TOWERS, "zero.stage=3", folder=tmp_path)
    said = "train.compile: blocks and loss (blocks, because zero.stage is 3)"
    assert (tmp_path / "log").read_text().count(said) == 1
    assert losses == pytest.approx(eager, rel=1e-5)
    assert all(each["graphs"] > 1 and each["breaks"] for each in compiled)


@pytest.mark.slow
def test_a_run_may_change_to_compiled_towers_when_it_resumes(run, eager, tmp_path):
    run(1, "train.steps=3", "checkpoint.every_steps=2", folder=tmp_path)
    shutil.rmtree(tmp_path / "compiled" / "checkpoints" / "step-00000003")
    losses, _ = run(1, TOWERS, folder=tmp_path)
    assert losses == pytest.approx(eager, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, ["train.compile=blocks", "train.activation_checkpointing=full"]),
        (1, [TOWERS, "train.activation_checkpointing=selective"]),
        (2, [TOWERS, "parallel.tp=2"]),
        (2, [TOWERS, "zero.stage=3"]),
    ],
)
def test_inductor_gives_the_losses_of_an_eager_run(run, eager, ranks, more):
    assert run(ranks, *more, backend="inductor")[0] == pytest.approx(eager, rel=1e-5)

"""The best checkpoint by a score: kept, recorded, exported, and refused where there is no score."""

import json
import math
from pathlib import Path

import pytest

from ds_linclip.checkpoint.directory import read_best
from ds_linclip.config import Config, load_config
from ds_linclip.interop.export import export_checkpoint
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.evaluators import Scores

TAG = "eval/score"


def config_of(output: Path, overrides: list[str], *more: str) -> Config:
    small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
    short = ["train.steps=6", "optim.warmup_steps=1", "data.num_workers=0", "eval.data=null"]
    kept = ["checkpoint.every_steps=2", "checkpoint.keep_last=1", f"checkpoint.keep_best={TAG}"]
    rest = ["log.tensorboard=false", "eval.every_steps=1", f"output_dir={output}", "name=run"]
    return load_config(EMBEDDED, [*overrides, *small, *short, *kept, *rest, *more])


def evaluator(scores: list[float], better: str) -> Scores:
    return Scores(lambda model, writer, step: {TAG: scores[step - 1]}, {TAG: better})


@pytest.mark.parametrize(
    ("scores", "better", "best"),
    [
        ([0.1, 0.2, 0.5, 0.3, math.nan, 0.5], "max", 3),
        ([4.0, 3.0, 2.0, 2.5, 3.0, 3.0], "min", 3),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "max", 6),
    ],
)
def test_best_checkpoint_is_kept_beside_the_newest(
    embedded_overrides, tmp_path, scores, better, best
):
    config = config_of(tmp_path, embedded_overrides)
    train(config, Mesh.create(), evaluator(scores, better))
    folder = config.run_dir / "checkpoints"
    names = {path.name for path in folder.glob("step-*")}
    assert {f"step-{best:08d}", "step-00000006"} <= names
    assert len(names) <= 3
    record = json.loads((folder / "best.json").read_text())
    assert record == {"checkpoint": f"step-{best:08d}", "metric": TAG, "value": scores[best - 1]}
    assert export_checkpoint(config.run_dir, tmp_path / "out", best=True).step == best


def test_resumed_run_compares_with_the_best_before(embedded_overrides, tmp_path):
    config = config_of(tmp_path, embedded_overrides, "train.steps=6")
    scores = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5]

    class Stop(ValueError):
        pass

    def stop_at_five(model, writer, step):
        if step == 5:
            raise Stop("stopped")
        return {TAG: scores[step - 1]}

    with pytest.raises(AgreedError, match="stopped"):
        train(config, Mesh.create(), Scores(stop_at_five, {TAG: "max"}))
    train(config, Mesh.create(), evaluator(scores, "max"))
    best = read_best(config.run_dir / "checkpoints")
    assert best is not None
    assert (best.checkpoint, best.value) == ("step-00000003", 0.9)
    assert (config.run_dir / "checkpoints" / best.checkpoint / "manifest.json").exists()


def test_score_that_no_evaluator_writes_is_refused_before_the_first_step(
    embedded_overrides, tmp_path
):
    config = config_of(tmp_path, embedded_overrides, "checkpoint.keep_best=eval/top1")
    with pytest.raises(
        AgreedError, match=r"checkpoint\.keep_best \(eval/top1\) must be .* writes: eval/score$"
    ):
        train(config, Mesh.create(), evaluator([0.0] * 6, "max"))
    with pytest.raises(AgreedError, match=r"keep_best .*: it writes none; set eval\.data"):
        train(config, Mesh.create())
    assert not (config.run_dir / "checkpoints").exists()


def test_export_without_a_record_is_refused(embedded_overrides, tmp_path):
    config = config_of(tmp_path, embedded_overrides, "checkpoint.keep_best=null")
    train(config, Mesh.create())
    with pytest.raises(ValueError, match=r"--best needs a run folder that records its best"):
        export_checkpoint(config.run_dir, tmp_path / "out", best=True)

"""Traces of chosen steps of a run, and what does not repeat or hide them."""

import gzip
import json

import pytest

from ds_linclip.config import Config, load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train
from helpers import EMBEDDED


def config_of(output, overrides, *more) -> Config:
    small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
    short = ["train.steps=5", "optim.warmup_steps=1", "data.num_workers=0", "eval.data=null"]
    quiet = ["log.tensorboard=false", "checkpoint.every_steps=2", "name=run"]
    return load_config(
        EMBEDDED, [*overrides, *small, *short, *quiet, f"output_dir={output}", *more]
    )


def test_chosen_steps_are_traced_once(embedded_overrides, tmp_path, caplog):
    chosen = ["log.profile.first_step=2", "log.profile.steps=2"]
    config = config_of(tmp_path, embedded_overrides, *chosen)
    train(config, Mesh.create())
    (path,) = (config.run_dir / "profile").iterdir()
    assert path.name == "rank-00000-step-2.pt.trace.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events}
    assert {n for n in names if n.startswith("ProfilerStep")} >= {
        f"ProfilerStep#{s}" for s in (2, 3)
    }
    assert "aten::addmm" in names or "aten::mm" in names
    written = path.stat().st_mtime_ns

    for each in (config.run_dir / "checkpoints").glob("step-*"):
        if each.name != "step-00000002":
            each.rename(each.with_suffix(".elsewhere"))
    train(config, Mesh.create())  # resumes in the middle of the chosen steps
    assert path.stat().st_mtime_ns == written
    assert "no trace" not in caplog.text


def test_steps_that_do_not_come_are_named(embedded_overrides, tmp_path, caplog):
    config = config_of(tmp_path, embedded_overrides, "log.profile.steps=1")
    train(config, Mesh.create())
    assert "log.profile: no trace, for step 20 did not come" in caplog.text
    assert not (config.run_dir / "profile").exists()


def test_trace_that_cannot_be_written_ends_the_run_by_name(embedded_overrides, tmp_path):
    chosen = ["log.profile.first_step=1", "log.profile.steps=1"]
    config = config_of(tmp_path, embedded_overrides, *chosen)
    config.run_dir.mkdir()
    (config.run_dir / "checkpoints").mkdir()
    (config.run_dir / "profile").touch()
    with pytest.raises(AgreedError, match=r"profile/rank-.* cannot be written: .*step 1 is saved"):
        train(config, Mesh.create())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log.profile.ranks=[-1]", r"log\.profile\.ranks \(\[-1\]\) must be numbers from 0 on"),
        ("log.profile.first_step=0", r"log\.profile\.first_step \(0\) must be greater than 0"),
    ],
)
def test_invalid_choices_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [override])


def test_rank_that_does_not_exist_is_refused_before_the_start(embedded_overrides, tmp_path):
    chosen = ["log.profile.steps=1", "log.profile.ranks=[0, 3]"]
    config = config_of(tmp_path, embedded_overrides, *chosen)
    with pytest.raises(AgreedError, match=r"log\.profile\.ranks \(3\) must be a rank of this run"):
        train(config, Mesh.create())
    assert not config.run_dir.exists()

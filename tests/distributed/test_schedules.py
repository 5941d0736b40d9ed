"""Schedules in training: resuming in each phase, branches of another run, lengths in epochs."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from ds_linclip.config import Config, load_config
from ds_linclip.data import Storage, find_shards
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train
from helpers import EMBEDDED

STEPS, COOLDOWN = 12, 8
SCHEDULES = {
    "cosine": "{kind: cosine, floor: 0.1}",
    "linear": "{kind: linear}",
    "constant": "{kind: constant}",
    "cooldown": f"{{kind: cooldown, cooldown_steps: {COOLDOWN}, power: 0.5}}",
}

pytestmark = pytest.mark.distributed


@pytest.fixture
def config_of(tmp_path, embedded_overrides):
    def load(name: str, schedule: str, *overrides: str) -> Config:
        return load_config(
            EMBEDDED,
            [
                *embedded_overrides,
                *(f"output_dir={tmp_path}", f"name={name}", "train.global_batch_size=8"),
                *(f"train.steps={STEPS}", f"optim.schedule={SCHEDULES[schedule]}"),
                *("checkpoint.every_steps=2", "checkpoint.keep_last=9", "optim.warmup_steps=3"),
                *("model.vision.layers=1", "model.text.layers=1", "data.num_workers=0"),
                *("optim.ema_decay=0.5", "model.vision.patch_dropout=0.5", "log.every_steps=1"),
                *("log.tensorboard=false", "eval.data=null", *overrides),
            ],
        )

    return load


def state_of(config: Config, step: int = STEPS) -> dict[str, bytes]:
    """Return the bytes of weights, averages and optimizer state of a checkpoint, by name."""
    file = config.run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def rates_of(config: Config) -> dict[int, float]:
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_resumes_in_each_phase_with_the_same_bits(config_of, schedule):
    config = config_of("run", schedule)
    train(config, Mesh.create())
    whole, rates = state_of(config), rates_of(config)
    assert sorted(rates) == list(range(1, STEPS + 1))
    for done in (2, 4, 8):  # in the warm-up, at the peak or its fall, and later
        for step in range(done + 2, STEPS + 1, 2):
            shutil.rmtree(config.run_dir / "checkpoints" / f"step-{step:08d}")
        train(config, Mesh.create())
        assert state_of(config) == whole, done
        assert rates_of(config) == rates


def test_a_branch_equals_the_run_without_interruption(config_of):
    whole = config_of("whole", "cooldown")
    train(whole, Mesh.create())
    trunk = config_of("trunk", "constant", "train.steps=20")
    train(trunk, Mesh.create())
    begin = trunk.run_dir / "checkpoints" / f"step-{STEPS - COOLDOWN:08d}"
    branch = config_of("branch", "cooldown", f"checkpoint.branch_from={begin}")
    train(branch, Mesh.create())
    assert state_of(branch) == state_of(whole)
    assert state_of(branch) != state_of(trunk)
    start = json.loads((branch.run_dir / "starts.jsonl").read_text().splitlines()[0])
    assert start["resumed_from"] == str(begin)
    assert sorted(rates_of(branch)) == list(range(STEPS - COOLDOWN + 1, STEPS + 1))

    for step in (STEPS, STEPS - 2):  # now it resumes from its own checkpoints
        shutil.rmtree(branch.run_dir / "checkpoints" / f"step-{step:08d}")
    train(branch, Mesh.create())
    assert state_of(branch) == state_of(whole)
    start = json.loads((branch.run_dir / "starts.jsonl").read_text().splitlines()[1])
    assert start["resumed_from"] == f"step-{STEPS - 4:08d}"


def test_a_branch_of_another_run_is_refused(config_of, tmp_path):
    trunk = config_of("trunk", "constant", "train.steps=4")
    train(trunk, Mesh.create())
    begin = trunk.run_dir / "checkpoints" / "step-00000004"
    for given, override, message in (
        (tmp_path / "nowhere", "train.steps=12", r"checkpoint\.branch_from \(.*nowhere\) must be"),
        (begin, "model.text.layers=2", r"to branch from .*model\.text\.layers \(2\) must equal 1"),
        (begin, "data.num_lanes=2", r"to branch from .*data\.num_lanes \(2\) must equal 1"),
        (begin, "train.steps=4", r"train\.steps \(4\) must be greater than 4, the step of"),
    ):
        branch = config_of("branch", "constant", f"checkpoint.branch_from={given}", override)
        with pytest.raises(AgreedError, match=message):
            train(branch, Mesh.create())


def test_epochs_become_steps_when_the_shards_are_found(config_of):
    data = config_of("run", "linear").data
    groups = find_shards(data.train, Storage(data.cache, data.network))
    epochs = 29.5 / sum(group.samples_per_epoch for group in groups)
    config = config_of("run", "linear", f"train.epochs={epochs!r}", "train.steps=0")
    assert config.train.steps == 0
    for _ in range(2):  # the second one resumes
        assert train(config, Mesh.create()).steps == 4
    saved = load_config(config.run_dir / "config.yaml").train
    assert (saved.steps, saved.epochs) == (4, None)

    alike = config_of("alike", "linear", "train.steps=4")
    train(alike, Mesh.create())
    assert state_of(alike, 4) == state_of(config, 4)
    too_short = config_of(
        "short", "linear", f"train.epochs={epochs!r}", "train.steps=0", "optim.warmup_steps=4"
    )
    with pytest.raises(AgreedError, match=r"warmup_steps \(4\) must be less"):
        train(too_short, Mesh.create())

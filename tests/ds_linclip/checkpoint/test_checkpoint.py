"""Checkpoints on one rank: which are kept, refused or used instead of a damaged one."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
from safetensors.torch import load_file, save_file

from ds_linclip.checkpoint.loading import latest_checkpoint, load_weights
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.checkpoint.sharded_safetensors import (
    StoredPiece,
    read_manifest,
    sha256_of,
    write_manifest,
)
from ds_linclip.config import CaptionSource, Config, LayerAttention, load_config
from ds_linclip.inference import load_model
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train

pytestmark = pytest.mark.long

SHARD = "rank-00000.safetensors"
SMALL = [
    "model.vision.layers=1",
    "model.text.layers=1",
    "train.steps=6",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
    "data.num_workers=0",
    "log.every_steps=1",
    "log.tensorboard=false",
    "eval.data=null",
]


@pytest.fixture
def run(embedded_overrides, tmp_path) -> Config:
    """A finished run of six steps with checkpoints at 2, 4 and 6, of which two are kept."""
    overrides = [*embedded_overrides, *SMALL, f"output_dir={tmp_path}", "name=run"]
    config = load_config("ds_configs/train/embedded.yaml", overrides)
    train(config, Mesh.create())
    return config


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def losses(config: Config) -> list[tuple[int, float]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["train/loss"]) for record in map(json.loads, lines)]


def test_damaged_checkpoint_is_set_aside_for_the_previous_one(run, caplog):
    folder = run.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000004", "step-00000006"]
    assert (folder / "latest").read_text() == "step-00000006"
    first = losses(run)
    damaged = folder / "step-00000006" / SHARD
    flip_a_bit(damaged)
    (folder / "step-00000008.tmp").mkdir()  # left by a kill in the middle of a save
    (folder / ".latest.0a1b.tmp").touch()  # and at its end

    with caplog.at_level(logging.WARNING):
        train(run, Mesh.create())

    assert f"{damaged}) does not match its checksum" in caplog.text
    assert losses(run) == first, "steps 5 and 6 are repeated exactly"
    undone = (run.run_dir / "metrics_undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in undone] == [5, 6]
    assert (folder / "step-00000006.rejected" / damaged.name).exists()
    assert latest_checkpoint(run.run_dir) == folder / "step-00000006"
    assert CheckpointManager(run, Mesh.create(), {}).newest() == folder / "step-00000006"
    assert not list(folder.glob("*.tmp"))


def test_run_resumes_when_a_default_that_it_used_is_written_out(run):
    newest = run.run_dir / "checkpoints" / "step-00000006"
    assert run.optim.beta2 is None
    run.optim.beta2 = 0.98
    assert CheckpointManager(run, Mesh.create(), {}).newest() == newest
    run.optim.beta2 = 0.99
    with pytest.raises(AgreedError, match=r"optim\.beta2 \(0\.99\) must equal 0\.98"):
        CheckpointManager(run, Mesh.create(), {}).newest()


def test_run_resumes_when_a_setting_that_came_later_has_its_default(run):
    newest = run.run_dir / "checkpoints" / "step-00000006"
    manifest = read_manifest(newest)
    later = [name for name in manifest["run"] if "attention_by_layer" in name or "local" in name]
    assert len(later) == 4
    for name in later:
        del manifest["run"][name]
    pieces = [StoredPiece(**piece) for piece in manifest.pop("pieces")]
    write_manifest(newest, manifest, pieces)
    assert CheckpointManager(run, Mesh.create(), {}).newest() == newest
    run.model.vision.attention_by_layer = [LayerAttention(layers="0")]
    with pytest.raises(AgreedError, match=r"vision\.attention_by_layer \(\[\{.*must equal \[\]"):
        CheckpointManager(run, Mesh.create(), {}).newest()


def test_run_resumes_with_the_captions_that_it_had(run):
    newest = run.run_dir / "checkpoints" / "step-00000006"
    manifest = read_manifest(newest)
    assert manifest["run"].pop("data.captions") == []  # as before there was a choice
    pieces = [StoredPiece(**piece) for piece in manifest.pop("pieces")]
    write_manifest(newest, manifest, pieces)
    assert CheckpointManager(run, Mesh.create(), {"data.captions": []}).newest() == newest
    other = {"data.captions": [asdict(CaptionSource(member="syn.txt"))]}
    with pytest.raises(AgreedError, match=r"data\.captions \(\[\{.*syn\.txt.*must equal \[\]"):
        CheckpointManager(run, Mesh.create(), other).newest()


def test_folder_without_a_valid_checkpoint_is_refused(run):
    folder = run.run_dir / "checkpoints"
    (folder / "step-00000006" / "manifest.json").unlink()
    (folder / "step-00000004" / SHARD).write_bytes(b"")
    before = sorted(run.run_dir.rglob("*"))
    with pytest.raises(
        AgreedError, match=r"no valid .*manifest\.json.*00000\.safetensors\) does not"
    ):
        train(run, Mesh.create())
    assert sorted(run.run_dir.rglob("*")) == before


def test_weights_that_cannot_be_read_are_named(run):
    checkpoint, mesh = latest_checkpoint(run.run_dir), Mesh.create()
    path = checkpoint / SHARD
    assert load_weights(checkpoint, mesh).logit_scale.shape == (1,)
    flip_a_bit(path)
    with pytest.raises(ValueError, match=r"checkpoint \(.*safetensors\) does not match"):
        load_weights(checkpoint, mesh)
    path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint \(.*safetensors\) does not match"):
        load_weights(checkpoint, mesh)


@pytest.mark.parametrize("step", ["write_manifest", "prune"])
def test_failure_ends_the_run_before_the_commit_and_is_logged_after_it(
    run, monkeypatch, caplog, step
):
    newest = run.run_dir / "checkpoints" / "step-00000006"
    shutil.rmtree(newest)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Input/output error")

    monkeypatch.setattr(f"ds_linclip.checkpoint.writer.{step}", refuse)
    if step == "write_manifest":
        with pytest.raises(AgreedError, match=r"step-00000006 was not saved: Input/output error"):
            train(run, Mesh.create())
        assert not newest.exists()
    else:
        train(run, Mesh.create())
        assert f"{newest} is saved, but what follows a save failed" in caplog.text
        assert latest_checkpoint(run.run_dir) == newest


def test_checkpoint_with_weights_that_are_not_finite_is_set_aside(run, caplog):
    folder = run.run_dir / "checkpoints"
    newest = folder / "step-00000006"
    weights = load_file(newest / SHARD)
    weights["weight/visual.proj"][3] = math.nan
    weights["exp_avg/visual.proj"][:2] = -math.inf
    save_file(weights, newest / SHARD)
    manifest = read_manifest(newest)
    size, sha256 = (newest / SHARD).stat().st_size, sha256_of(newest / SHARD)
    manifest["files"][SHARD] = {"size": size, "sha256": sha256}
    pieces = [StoredPiece(**piece) for piece in manifest.pop("pieces")]
    write_manifest(newest, manifest, pieces)
    message = rf"checkpoint \({newest}\): weights must be finite, but 2 of \d+ tensors .*"
    message += r"exp_avg/visual\.proj \(2 of 4096 values\)"
    with pytest.raises(ValueError, match=r"1 of \d+ tensors.*visual\.proj \(1 of 4096 values\)"):
        load_model(newest)
    train(run, Mesh.create())
    assert [each for each in caplog.messages if re.search(message, each)]
    assert sorted(p.name for p in folder.glob("step-*.rejected")) == ["step-00000006.rejected"]
    shutil.rmtree(folder / "step-00000004")
    shutil.rmtree(folder / "step-00000006")
    (folder / "step-00000006.rejected").rename(newest)
    with pytest.raises(AgreedError, match=r"holds no valid checkpoint \(checkpoint .*" + "finite"):
        train(run, Mesh.create())


@pytest.mark.parametrize(("before", "after"), [(None, 4), (4, None)])
def test_bf16_resumes_with_other_micro_batches(embedded_overrides, tmp_path, before, after):
    """DeepSpeed uses another optimizer for bf16 with accumulation, without a loss scale."""
    overrides = [*embedded_overrides, *SMALL, f"output_dir={tmp_path}", "train.precision=bf16"]
    config = load_config("ds_configs/train/embedded.yaml", [*overrides, "name=run"])
    config.train.micro_batch_size = before
    train(config, Mesh.create())
    whole = losses(config)
    shutil.rmtree(config.run_dir / "checkpoints" / "step-00000006")
    config.train.micro_batch_size = after
    train(config, Mesh.create())
    assert [step for step, _ in losses(config)] == [1, 2, 3, 4, 5, 6]
    assert dict(losses(config)) == pytest.approx(dict(whole), rel=1e-2)


def test_folder_of_checkpoints_is_read_without_torch():
    """The supervisor reads it, and must hold neither gigabytes nor a GPU."""
    program = "import sys, ds_linclip.checkpoint.directory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

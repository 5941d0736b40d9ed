"""``linclip linearize`` from a softmax model to a linear one, on the embedded data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_linclip.config import ParallelConfig, load_config
from ds_linclip.interop.hub_folder import CONFIG_FILE, WEIGHTS_FILE
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

SHORT = [
    "train.steps=10",
    "optim.warmup_steps=1",
    "train.global_batch_size=16",
    "eval.data=null",
    "log.every_steps=1",
]


def linearize(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linclip_launch.cli", "linearize", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def softmax(tmp_path: Path, embedded_overrides: list[str]) -> Path:
    config = load_config("embedded_softmax", embedded_overrides)
    torch.manual_seed(0)
    folder = tmp_path / "softmax"
    export_folder(CLIP(config.model, Mesh.create(ParallelConfig(device="cpu"))), folder)
    return folder


@pytest.mark.distributed
def test_softmax_model_becomes_a_linear_one_in_three_stages(
    tmp_path: Path, softmax: Path, embedded_overrides: list[str]
) -> None:
    output = tmp_path / "linear"
    words = [softmax, "embedded", *embedded_overrides, *SHORT, "--ranks", "1", "--output", output]
    done = linearize(*words, "--attention", "{kind: linear, normalized: true}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    content = json.loads((output / "finish" / CONFIG_FILE).read_text())["model_cfg"]
    for tower in ("vision_cfg", "text_cfg"):
        assert content[tower]["attention"]["kind"] == "linear"
        assert content[tower]["attention"]["normalized"] is True

    before, transferred, distilled = (
        load_file(folder / WEIGHTS_FILE)
        for folder in (softmax, output / "transfer", output / "distil")
    )
    changed = {key for key in before if not torch.equal(before[key], transferred[key])}
    assert changed
    assert all(".attn." in key for key in changed)  # the first stage trains attention alone
    rest = {
        key for key in before if ".mlp." in key and not torch.equal(before[key], distilled[key])
    }
    assert len(rest) == len([key for key in before if ".mlp." in key])

    losses = [
        json.loads(line).get("train/loss")
        for line in (output / "runs" / "transfer" / "metrics.jsonl").read_text().splitlines()
    ]
    errors = [loss for loss in losses if loss is not None]
    assert errors[-1] < errors[0]

    records = (output / "runs" / "distil" / "metrics.jsonl").read_text()
    assert "train/loss_features" in records
    assert "train/loss_similarity" in records

    again = linearize(*words, "--attention", "{kind: linear, normalized: true}")
    assert again.returncode == 0
    assert "step" not in again.stderr  # nothing was trained again
    copy = shutil.copytree(softmax, tmp_path / "copy")
    for other in (
        linearize(*words, "--attention", "inline"),
        linearize(copy, *words[1:], "--attention", "{kind: linear, normalized: true}"),
    ):
        assert other.returncode == 2
        assert f"output folder ({output}) holds a linearisation of another model or" in other.stderr


def test_wrong_attention_is_one_line(
    tmp_path: Path, softmax: Path, embedded_overrides: list[str]
) -> None:
    words = [softmax, "embedded", *embedded_overrides, *SHORT, "--output", tmp_path / "out"]
    done = linearize(*words, "--attention", "lineer")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("did you mean linear?"), done.stderr
    assert not (tmp_path / "out").exists()

"""Training from CUDA graphs, on a CUDA device: the losses are those of the same kernels without."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import EMBEDDED, REPOSITORY, job_environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 8  # of each graph the first runs and warms up, the second is captured, the others replay


def run(folder: Path, *more: str) -> dict[str, Any]:
    """Train in a process of its own: DeepSpeed's accelerator in the tests' process is the CPU."""
    base = [f"output_dir={folder}", f"train.steps={STEPS}", "train.global_batch_size=64"]
    base += ["eval.data=null", "data.num_workers=0", "log.every_steps=1", "log.tensorboard=false"]
    base += ["optim.warmup_steps=1", "optim.lr=3e-4", "model.vision.layers=2"]
    base += ["parallel.device=cuda", *more]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.captured_training", str(EMBEDDED), *base],
        cwd=REPOSITORY,
        env=job_environment(DS_ACCELERATOR="cuda"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "more",
    [
        ["zero.stage=1"],
        ["zero.stage=2", "train.precision=bf16", "train.activation_checkpointing=selective"],
    ],
)
def test_losses_are_those_without_cuda_graphs(more, embedded_overrides, tmp_path):
    data = [embedded_overrides[0], "train.compile=towers", *more]
    plain = run(tmp_path / "plain", *data)
    captured = run(tmp_path / "captured", *data, "train.cuda_graphs=true")
    assert plain["graphs"] == 0
    # Forward and backward of towers and loss, each captured once.
    assert captured["graphs"] == 4
    assert len(captured["losses"]) == STEPS
    assert captured["losses"] == pytest.approx(plain["losses"], rel=1e-5)

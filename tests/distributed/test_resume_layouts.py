"""Going on with another number of data-parallel ranks, where a model is split over ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from forked_ranks import train_in_ranks

from ds_linclip.config import Config, load_config

EMBEDDED = Path(__file__).parents[2] / "ds_configs" / "train" / "embedded.yaml"

pytestmark = pytest.mark.distributed


def config_of(folder: Path, name: str, *overrides: str) -> Config:
    return load_config(
        EMBEDDED,
        [
            *(f"output_dir={folder}", f"name={name}", "train.steps=4", "checkpoint.every_steps=2"),
            *("train.global_batch_size=16", "train.micro_batch_size=8", "optim.ema_decay=0.5"),
            *("optim.warmup_steps=1", "optim.eps=1e-4", "log.every_steps=1", "data.num_workers=0"),
            *(*overrides, "log.tensorboard=false", "eval.data=null"),
        ],
    )


@pytest.mark.parametrize(
    "split", [pytest.param("parallel.tp=2", marks=pytest.mark.slow), "parallel.pp=2"]
)
def test_averages_go_on_with_fewer_data_ranks(tmp_path, embedded_overrides, split):
    overrides = [*embedded_overrides, split]
    losses, averages = train_in_ranks(config_of(tmp_path, "whole", *overrides), 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    again, resumed = train_in_ranks(config_of(tmp_path, "resumed", *overrides), 2)
    assert again == pytest.approx(losses, rel=1e-5)
    for name, average in averages.items():
        torch.testing.assert_close(resumed[name], average, rtol=1e-4, atol=1e-6)

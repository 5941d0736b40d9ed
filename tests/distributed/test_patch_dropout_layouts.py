"""Training with patch dropout: every layout keeps the same patches."""

import pytest

from ds_linclip.config import load_config
from helpers import EMBEDDED
from helpers.forked_ranks import train_in_ranks

pytestmark = pytest.mark.distributed
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "cp2": ["parallel.cp=2"],
    "pp2": ["parallel.pp=2", "train.micro_batch_size=16"],
    "dp2": ["train.micro_batch_size=8"],
}


@pytest.fixture(scope="module")
def train(embedded_overrides, tmp_path_factory):
    def train(ranks: int, *more: str):
        folder = tmp_path_factory.mktemp("run")
        run = [f"output_dir={folder}", "train.steps=3", "eval.data=null", "train.seed=5"]
        batch = ["train.global_batch_size=32", "data.num_workers=0", "checkpoint.every_steps=9"]
        log = ["log.every_steps=1", "log.tensorboard=false", "optim.warmup_steps=1"]
        drop = ["model.vision.patch_dropout=0.5"]
        all_of_them = [embedded_overrides[0], *run, *batch, *log, *drop, *more]
        return train_in_ranks(load_config(EMBEDDED, all_of_them), ranks)

    return train


@pytest.fixture(scope="module")
def single(train):
    return train(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_losses_of_one_process(train, single, layout):
    losses, weights = train(2, *LAYOUTS[layout])
    expected_losses, expected = single
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for key, value in weights.items():
        assert (value - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


@pytest.mark.slow
def test_the_seed_chooses_the_patches(train, single):
    assert train(1, "model.vision.patch_dropout=0")[0][1] != single[0][1]

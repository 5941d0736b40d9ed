"""torch.compile of the blocks gives the same losses; slow: inductor starts cold in every rank."""

import pytest

from ds_linclip.config import load_config
from helpers import EMBEDDED
from helpers.forked_ranks import train_in_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (1, []),
        (2, ["parallel.tp=2"]),
        (2, ["zero.stage=3"]),
        (1, ["train.activation_checkpointing=full"]),
    ],
)
def test_losses_are_those_of_eager_blocks(embedded_overrides, tmp_path, ranks, axes):
    def train(name: str, *more: str) -> dict[int, float]:
        run = [f"output_dir={tmp_path}", f"name={name}", "train.steps=2", "eval.data=null"]
        batch = ["train.global_batch_size=32", "data.num_workers=0", "checkpoint.every_steps=9"]
        log = ["log.every_steps=1", "log.tensorboard=false", "optim.warmup_steps=1"]
        small = ["model.vision.layers=2", embedded_overrides[0]]
        config = load_config(EMBEDDED, [*run, *batch, *log, *small, *axes, *more])
        return train_in_ranks(config, ranks)[0]

    assert train("compiled", "train.compile=true") == pytest.approx(train("eager"), rel=1e-5)

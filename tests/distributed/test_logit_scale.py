"""The logit scale and bias in fp32 whatever the precision, in every layout and across them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ds_linclip.checkpoint.loading import load_weights
from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from helpers import EMBEDDED
from helpers.forked_ranks import train_in_ranks

#: Each resumes from the checkpoint that the one before wrote after one more step.
LAYOUTS = [
    ["zero.stage=1", "train.micro_batch_size=4"],
    ["zero.stage=1"],
    ["zero.stage=2", "train.micro_batch_size=4"],
    ["zero.stage=3"],
    ["parallel.tp=2"],
    ["parallel.cp=2"],
    ["parallel.pp=2", "train.micro_batch_size=4"],
    ["zero.stage=2", "zero.offload_optimizer=cpu"],
]
STEPS = len(LAYOUTS) + 1


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(
        EMBEDDED,
        [
            *(f"output_dir={folder}", "name=run", f"train.steps={STEPS}", "loss.kind=sigmoid"),
            *("checkpoint.every_steps=1", "checkpoint.keep_last=99", "log.every_steps=1"),
            *("train.global_batch_size=16", "model.vision.layers=1", "model.text.layers=1"),
            *("optim.warmup_steps=1", "data.num_workers=0", "log.tensorboard=false"),
            *("eval.data=null", *overrides),
        ],
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("bf16", "adamw"),
        pytest.param("amp_bf16", "adamw", marks=pytest.mark.slow),
        pytest.param("bf16", "lion", marks=pytest.mark.slow),
        pytest.param("bf16", "lamb", marks=pytest.mark.slow),
    ],
)
def test_scale_and_bias_are_fp32_through_a_chain_of_layouts(
    tmp_path, embedded_overrides, precision, kind
):
    """The loss sees the numbers that the optimizer has, and that checkpoints and exports hold."""
    form = [*embedded_overrides, f"train.precision={precision}", f"optim.kind={kind}"]
    checkpoints = tmp_path / "run" / "checkpoints"
    for leg, layout in enumerate(LAYOUTS):
        train_in_ranks(config_of(tmp_path, *form, *layout), 2)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if "train/logit_scale" in r]
        scales = {r["step"]: r["train/logit_scale"] for r in records}
        assert scales[1] == pytest.approx(10, rel=1e-6)  # rounded to bf16 it would be 9.94
        for path in sorted(checkpoints.glob("step-*")):
            step = int(path.name.removeprefix("step-"))
            saved = to_open_clip(load_weights(path, Mesh.create()))
            if step < STEPS:
                seen, kept = scales[step + 1], saved["logit_scale"].exp()
                assert seen == pytest.approx(kept.item(), rel=1e-7), (layout, step)
            for key in ("logit_scale", "logit_bias"):
                assert saved[key].dtype == torch.float32
                assert saved[key] != saved[key].bfloat16().float(), (layout, step)
            if step > leg + 1:
                shutil.rmtree(path)  # the next one starts from the last of the others
        assert all(scales[step] != scales[step + 1] for step in range(1, STEPS))  # at every step


@pytest.mark.parametrize("stage", [1, 3])
def test_master_weights_are_not_rounded_at_the_start(stage):
    config = load_config(
        EMBEDDED,
        [
            *("train.precision=bf16", f"zero.stage={stage}", "parallel.device=cpu"),
            *("model.vision.layers=1", "model.text.layers=1", "loss.kind=sigmoid"),
        ],
    )
    mesh = Mesh.create(config.parallel)
    model = CLIP(config.model, mesh, loss="sigmoid")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    pieces = {piece.name: piece.tensors["weight"].clone() for piece in engine.state.pieces()}
    assert pieces.keys() == before.keys()
    for name, weight in pieces.items():
        assert weight.equal(before[name].flatten()), name
    assert pieces["logit_scale"].item() == pytest.approx(math.log(10), rel=1e-7)

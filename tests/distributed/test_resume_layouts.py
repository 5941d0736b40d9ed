"""One run that is resumed in one layout after the other, with the losses of a whole run."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.attention.zoo import ZOO, overrides_of
from ds_linclip.checkpoint.loading import load_weights
from ds_linclip.config import Config, load_config
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.forked_ranks import train_in_ranks
from linclip_kernels.linear_attention.reference import relative_rms

STEPS = 10
#: Ranks and layout; each but the last resumes from the previous one and takes two steps.
CHAIN = [
    (4, []),
    (4, ["parallel.tp=2"]),
    (4, ["parallel.pp=2"]),
    (4, ["zero.stage=3"]),
    (2, ["zero.stage=3", "parallel.tp=2", "train.micro_batch_size=8"]),
]
#: Kinds with parameters of their own, of every form.
QUICK_KINDS = ("inline-local", "luna", "polaformer", "gated-delta", "frequency-tokens")

pytestmark = pytest.mark.distributed


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(
        EMBEDDED,
        [
            *(f"output_dir={folder}", "name=run", f"train.steps={STEPS}"),
            *("checkpoint.every_steps=2", "checkpoint.keep_last=9"),
            *("train.global_batch_size=16", "optim.ema_decay=0.5", "model.vision.layers=2"),
            *("optim.warmup_steps=1", "optim.eps=1e-4", "log.every_steps=1", "data.num_workers=0"),
            *(*overrides, "log.tensorboard=false", "eval.data=null"),
        ],
    )


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance", "distance"),
    [
        ("adamw", "fp32", 1e-5, 1e-6),
        pytest.param("lion", "fp32", 1e-5, 1e-3, marks=pytest.mark.slow),
        pytest.param("lamb", "bf16", 1e-2, 5e-3, marks=pytest.mark.slow),
    ],
)
def test_chain_of_layouts(tmp_path, embedded_overrides, kind, precision, tolerance, distance):
    form = [*embedded_overrides, f"optim.kind={kind}", f"train.precision={precision}"]
    checkpoints = tmp_path / "run" / "checkpoints"
    for leg, (ranks, layout) in enumerate(CHAIN):
        losses, averages = train_in_ranks(config_of(tmp_path, *form, *layout), ranks)
        if leg == 0:
            whole, expected = losses, averages
        assert sorted(losses) == list(range(1, STEPS + 1))
        assert losses == pytest.approx(whole, rel=tolerance), layout
        # Over all weights together: where a gradient is nearly zero, its rounding decides how far a
        # step of Lion or LAMB goes for that weight, on every processor in another way.
        both = [(average.flatten(), expected[name].flatten()) for name, average in averages.items()]
        assert relative_rms(*map(torch.cat, zip(*both, strict=True))) <= distance, layout
        newest = to_open_clip(load_weights(checkpoints / f"step-{STEPS:08d}", Mesh.create()))
        for name, average in averages.items():
            assert newest[name].to(average.dtype).equal(average), (layout, name)
        for step in range(2 * leg + 4, STEPS + 1, 2):  # the next one starts here
            shutil.rmtree(checkpoints / f"step-{step:08d}")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK_KINDS else pytest.param(name, marks=pytest.mark.slow) for name in ZOO],
)
def test_every_kind_resumes_with_the_same_bits(tmp_path, embedded_overrides, name):
    small = ["model.text.layers=1", "model.vision.layers=1", "train.steps=4", *overrides_of(name)]
    weights = []
    for starts in (["whole"], ["parts", "parts"]):
        for start, folder in enumerate(starts, start=1):
            config = config_of(tmp_path / folder, *embedded_overrides, *small)
            checkpoints = config.run_dir / "checkpoints"
            train(config, Mesh.create())
            if start < len(starts):
                shutil.rmtree(checkpoints / "step-00000004")
        weights.append(to_open_clip(load_weights(checkpoints / "step-00000004", Mesh.create())))
    for key, value in weights[0].items():
        assert weights[1][key].equal(value), key

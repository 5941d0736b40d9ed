"""Exports of runs that were trained on several ranks, loaded by open_clip."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from ds_linclip.checkpoint.loading import load_weights
from ds_linclip.config import ParallelConfig, load_config
from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.hub_folder import WEIGHTS_FILE
from ds_linclip.interop.state_dict import export_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import REPOSITORY
from helpers.forked_ranks import train_in_ranks

EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded_softmax.yaml"
STEPS = 3
PIPELINE = [4, "parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=4"]
ZERO_3 = [2, "zero.stage=3"]
LOCKED = ["init.pretrained={folder}", "init.lock_image=true", "init.lock_image_unlocked_groups=1"]

pytestmark = pytest.mark.distributed


def write_folder(path: Path) -> None:
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    torch.manual_seed(7)
    export_folder(CLIP(load_config(EMBEDDED).model, mesh), path)
    mesh.close()


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        pytest.param(PIPELINE, [], id="tp2-pp2"),
        pytest.param(PIPELINE, ["optim.ema_decay=0.5"], id="tp2-pp2-ema"),
        pytest.param(ZERO_3, LOCKED, id="zero3-locked"),
        pytest.param(
            [2, "zero.stage=2"],
            ["optim.ema_decay=0.5", *LOCKED],
            id="zero2-ema-locked",
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_open_clip_computes_the_features_of_the_run(tmp_path, embedded_overrides, layout, more):
    ranks, *axes = layout
    folder, out = tmp_path / "start", tmp_path / "out"
    if LOCKED[0] in more:
        run_ranks(1, write_folder, folder)
    config = load_config(
        EMBEDDED,
        [
            *(embedded_overrides[0], f"output_dir={tmp_path}", "name=run", "eval.data=null"),
            *(f"train.steps={STEPS}", "train.global_batch_size=16", "optim.warmup_steps=1"),
            *("data.num_workers=0", "log.every_steps=1", "log.tensorboard=false"),
            *(*axes, *(override.format(folder=folder) for override in more)),
        ],
    )
    losses, seen = train_in_ranks(config, ranks)
    exported = export_checkpoint(config.run_dir, out)
    assert exported.step == STEPS
    stored = load_file(out / WEIGHTS_FILE)
    assert stored.keys() == seen.keys()
    for key, value in seen.items():  # what evaluation has seen, bit for bit
        assert stored[key].equal(value), key
    if LOCKED[0] in more:
        start = load_file(folder / WEIGHTS_FILE)
        assert stored["visual.ln_post.weight"].equal(start["visual.ln_post.weight"])
        assert not stored["visual.proj"].equal(start["visual.proj"])

    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    ours = load_weights(exported.checkpoint, Mesh.create(ParallelConfig(device="cpu"))).eval()
    assert to_open_clip(ours).keys() == stored.keys()
    images, texts = torch.randn(3, 3, 32, 32), torch.randint(0, 49408, (3, 32))
    theirs.eval()
    assert relative_rms(theirs.encode_image(images), ours.encode_image(images)) < 1e-5
    assert relative_rms(theirs.encode_text(texts), ours.encode_text(texts)) < 1e-5

    card = (out / "README.md").read_text()
    assert f"| `train/loss` | {losses[STEPS]:.4f} | {STEPS} |" in card
    assert f"| steps | {STEPS} of {STEPS} |" in card
    export_checkpoint(config.run_dir, tmp_path / "raw", weights="raw")
    raw = load_file(tmp_path / "raw" / WEIGHTS_FILE)
    is_average = "optim.ema_decay=0.5" in more
    assert raw["text_projection"].equal(stored["text_projection"]) != is_average

"""Train every kind of attention for a few steps on ranks of one layout.

``python -m helpers.attention_layouts_job FOLDER LAYOUT NAME...`` writes losses, weights and traffic
of each kind; see test_attention_layouts.py.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure_on_ranks
from benchmarks.attention.zoo import overrides_of
from benchmarks.traffic import TrafficMeter
from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.model.patch_dropout import kept_patches
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import plan_rank
from helpers import REPOSITORY

BATCH, STEPS = 8, 3
MODEL = [
    *("model.vision.image_size=[32,48]", "model.vision.patch_size=8", "model.vision.layers=2"),
    *("model.vision.width=64", "model.vision.head_width=16", "model.text.layers=2"),
    *("model.text.width=64", "model.text.heads=4", "model.text.context_length=16"),
    *("model.embed_dim=32", "data.train=unused.tar", "eval.data=null", "train.steps=100"),
    *(f"train.global_batch_size={BATCH}", "train.seed=0", "optim.warmup_steps=0"),
    "model.vision.patch_dropout=0.25",
    # The bias of softmax's keys has no gradient but rounding: a small eps would magnify it.
    *("optim.eps=1e-4", "parallel.device=cpu", "train.precision=fp32"),
]
#: Number of ranks and overrides.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2-micro2": (2, ["parallel.pp=2", "train.micro_batch_size=4"]),
    "dp2-zero3": (2, ["zero.stage=3"]),
    "cp2": (2, ["parallel.cp=2"]),
    # Compared with each other.
    "amp": (2, ["zero.stage=3", "train.precision=amp_bf16"]),
    "amp-selective": (
        2,
        [
            *("zero.stage=3", "train.precision=amp_bf16"),
            "train.activation_checkpointing=selective",
        ],
    ),
}


def config_of(name: str, layout: str) -> Config:
    """Return the config of a kind in a layout, with dropped patches."""
    overrides = [*MODEL, *overrides_of(name), *LAYOUTS[layout][1]]
    return load_config(REPOSITORY / "ds_configs" / "train" / "embedded.yaml", overrides)


def batch_of(config: Config, mesh: Mesh) -> tuple[Tensor, ...]:
    """Return this rank's part of one global batch."""
    generator, vision = torch.Generator().manual_seed(0), config.model.vision
    images = torch.randn(BATCH, 3, *vision.image_size, generator=generator)
    texts = torch.randint(config.model.text.vocab_size - 1, (BATCH, 16), generator=generator)
    texts[:, -1] = config.model.text.vocab_size - 1
    batch: tuple[Tensor, ...] = images, texts
    if vision.patch_dropout:
        num_kept = vision.num_kept_patches_at(vision.image_size)
        num_patches = vision.num_tokens - 1
        samples = torch.arange(BATCH)
        kept = kept_patches(samples, num_patches=num_patches, num_kept=num_kept, seed=0)
        batch = *batch, kept
    return tuple(each.chunk(mesh.dp.size)[mesh.dp.rank] for each in batch)


def train_kinds(folder: Path, names: list[str], layout: str) -> dict[str, Any]:
    """Return losses, final weights, and measured and planned bytes by axis, for every kind."""
    # Nothing is fetched ahead: ZeRO-3 keeps what it has fetched for two uses, and gathers it once.
    settings = folder / f"deepspeed-{os.environ['RANK']}.json"
    settings.write_text('{"zero_optimization": {"stage3_prefetch_bucket_size": 0}}')
    found = {}
    for name in names:
        config = config_of(name, layout)
        config.zero.deepspeed_config = str(settings)
        mesh = Mesh.create(config.parallel)
        torch.manual_seed(0)
        model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
        model.recompute_activations(config.train.activation_checkpointing)
        planned = plan_rank(config, mesh).traffic
        engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
        batch = batch_of(config, mesh)
        losses = [float(engine.step(batch, lr=2e-4)) for _ in range(STEPS)]
        axes = {"tp": mesh.tp, "cp": mesh.cp, "pp": mesh.pp, "dp": mesh.dp, "zero": mesh.replicas}
        with TrafficMeter({axis: each.group for axis, each in axes.items()}) as meter:
            losses.append(float(engine.step(batch, lr=2e-4)))
        with engine.evaluation_model() as whole:
            weights = to_open_clip(whole)
        found[name] = losses, weights, dict(meter.bytes), planned
    return found


def main(folder: Path, layout: str, names: list[str]) -> None:
    num_ranks, _ = LAYOUTS[layout]
    ranks = measure_on_ranks(num_ranks, train_kinds, folder, names, layout)
    assert all(math.isfinite(loss) for each in ranks for loss in each[names[0]][0])
    torch.save(ranks, folder / f"{layout}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

"""Runs on two ranks; everything that it measures goes to ``<folder>/rank*.json``.

One start, many checks: see test_training.py, which reads the files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.loss.contrastive import clip_loss
from ds_linclip.loss.grad_cache import ContrastiveLoss, Targets
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train

STEPS, MIDDLE = 26, 13
SHORT = [
    *("train.steps=4", "checkpoint.every_steps=2", "optim.warmup_steps=1"),
    "train.global_batch_size=32",
]
#: What is interrupted and resumed, on two ranks.
FORMS = {
    "fp32_zero1": ["train.precision=fp32"],
    "bf16_zero2": ["train.precision=bf16", "zero.stage=2"],
    "bf16_zero3_ema": ["train.precision=bf16", "zero.stage=3", "optim.ema_decay=0.9"],
    "fp32_tp2": ["train.precision=fp32", "parallel.tp=2"],
    "bf16_pp2_accumulated": [
        *("train.precision=bf16", "parallel.pp=2", "train.micro_batch_size=16"),
        "optim.ema_decay=0.9",
    ],
    "fp32_cp2_sigmoid": [
        *("train.precision=fp32", "parallel.cp=2", "loss.kind=sigmoid", "optim.kind=lamb"),
        "model.vision.patch_dropout=0.5",
    ],
}


def main(folder: Path, config_file: str, overrides: list[str]) -> None:
    mesh = Mesh.create()

    def config(name: str, *more: str) -> Config:
        # An epoch has 11 steps: the middle of the run is inside the second one.
        run = [f"output_dir={folder}", f"name={name}", f"train.steps={STEPS}", "log.every_steps=1"]
        plan = ["optim.warmup_steps=4", f"checkpoint.every_steps={MIDDLE}", "eval.data=null"]
        return load_config(config_file, [*overrides, *run, *plan, *more])

    results: dict[str, Any] = {
        "agree": agree(mesh),
        "loss": loss_against_one_process(mesh),
    }
    for name, form in FORMS.items():
        # The first runs long enough to learn something; others only show that they resume.
        short = [] if name == "fp32_zero1" else SHORT
        whole = config(f"{name}_whole", *form, *short)
        of_form = Mesh.create(whole.parallel)
        train(whole, of_form)
        again = config(f"{name}_again", *form, *short, "data.num_workers=0")
        if mesh.rank == 0:
            shutil.copytree(whole.run_dir / "checkpoints", again.run_dir / "checkpoints")
            shutil.rmtree(again.run_dir / "checkpoints" / f"step-{whole.train.steps:08d}")
        mesh.barrier()
        train(again, of_form)
    mesh = Mesh.create()
    small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
    results["scale"] = logit_scale_under_pressure(
        mesh, config("scale", "train.precision=bf16", *small)
    )
    (folder / f"rank{mesh.rank}.json").write_text(json.dumps(results))
    mesh.barrier()
    mesh.close()


def agree(mesh: Mesh) -> dict[str, Any]:
    """Return what each rank receives when one rank fails."""

    def fail_on_rank_one() -> int:
        if mesh.rank == 1:
            raise ValueError("disk (full) must have room")
        return 7

    try:
        mesh.agree(fail_on_rank_one)
    except AgreedError as error:
        message = str(error)
    return {"message": message, "value": mesh.agree(lambda: mesh.rank)}


def loss_against_one_process(mesh: Mesh) -> dict[str, float]:
    """Compare loss and gradients of two ranks with those of the whole batch, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, mesh.world_size * 6, 16, generator=generator, dtype=torch.float64)
    scale = torch.tensor(12.0, dtype=torch.float64)
    whole, whole_scale = rows.clone().requires_grad_(), scale.clone().requires_grad_()
    images, texts = F.normalize(whole, dim=-1)
    expected = clip_loss(images, texts, whole_scale)
    expected.backward()

    mine = slice(mesh.rank * 6, (mesh.rank + 1) * 6)
    part, part_scale = rows[:, mine].clone().requires_grad_(), scale.clone().requires_grad_()
    images, texts = F.normalize(part, dim=-1)
    loss = clip_loss(images, texts, part_scale, mesh.dp.group)
    loss.backward()
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    # Data parallelism averages the gradients of parameters; a feature's is summed by its owner.
    gradients = (part.grad, whole.grad, part_scale.grad, whole_scale.grad)
    of_part, of_whole, of_part_scale, of_whole_scale = (g for g in gradients if g is not None)
    dist.all_reduce(of_part_scale)
    return {
        "loss": (mean_loss / mesh.world_size - expected).abs().item(),
        "features": (of_part / mesh.world_size - of_whole[:, mine]).abs().max().item(),
        "scale": abs(of_part_scale / mesh.world_size - of_whole_scale).item(),
    }


class Pulled(ContrastiveLoss):
    """A loss equal to the logit scale times a weight that differs between ranks."""

    weight = 1.0

    def _terms(
        self, images: Tensor, texts: Tensor, targets: Targets, scale: Tensor, *_: Tensor
    ) -> Tensor:
        return self.weight * scale[None] + 0 * (images.sum() + texts.sum())


def logit_scale_under_pressure(mesh: Mesh, config: Config) -> dict[str, list[float]]:
    """Return the logit scale of every step while the loss increases it strongly, then decreases it.

    One rank's part of the batch always pulls the other way; the whole batch decides.
    """
    model = CLIP(config.model, mesh)
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    engine.objective = objective = Pulled(config.loss, mesh)
    batch = torch.zeros(4, 3, 32, 32), torch.ones(4, 8, dtype=torch.int64)
    seen: dict[str, list[float]] = {"up": [], "down": []}
    part = 3.0 if mesh.rank == 0 else -1.0
    for direction, sign in (("up", -1.0), ("down", 1.0)):
        for _ in range(25):
            objective.weight = sign * part
            engine.step(batch, lr=0.2)
            seen[direction].append(objective.logit_scale.item())
    return seen

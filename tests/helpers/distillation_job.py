"""Distil a linear student from a softmax teacher on ranks of one layout.

``python -m helpers.distillation_job FOLDER LAYOUT TEACHER`` writes losses, terms and weights; see
test_distillation_layouts.py.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure_on_ranks
from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.teacher import Teacher
from helpers import REPOSITORY
from helpers.attention_layouts_job import MODEL, batch_of

STEPS = 3
TERMS = [
    "loss.terms=[{kind: contrastive, weight: 0.5}, {kind: features, weight: 2, final_weight: 1}, "
    "{kind: similarity}]",
]
#: Number of ranks and overrides.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2-micro2": (2, ["parallel.pp=2", "train.micro_batch_size=4"]),
    "dp2-zero3-micro2": (2, ["zero.stage=3", "train.micro_batch_size=2"]),
    "cp2": (2, ["parallel.cp=2"]),
}


def config_of(layout: str, teacher: str) -> Config:
    """Return the config of a layout, with dropped patches."""
    settings = [f"teacher.model={teacher}", "teacher.precision=fp32", *TERMS]
    overrides = [*MODEL, *settings, *LAYOUTS[layout][1]]
    return load_config(REPOSITORY / "ds_configs" / "train" / "embedded.yaml", overrides)


def distil(layout: str, teacher: str) -> dict[str, Any]:
    """Return the losses and terms of every step, and the final weights."""
    config = config_of(layout, teacher)
    mesh = Mesh.create(config.parallel)
    torch.manual_seed(0)
    model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    frozen = Teacher(config, mesh)
    images, texts, *more = batch_of(config, mesh)
    losses, terms = [], []
    for step in range(STEPS):
        weights = [term.weight_at(step, STEPS) for term in config.loss.terms]
        engine.objective.weights = weights
        targets = frozen(images, texts)
        losses.append(float(engine.step((images, texts, *more), lr=2e-4, targets=targets)))
        terms.append(engine.objective.values.tolist())
    with engine.evaluation_model() as whole:
        return {"losses": losses, "terms": terms, "weights": to_open_clip(whole)}


if __name__ == "__main__":
    folder, layout, teacher = sys.argv[1:]
    found = measure_on_ranks(LAYOUTS[layout][0], distil, layout, teacher)
    torch.save(found, Path(folder) / f"{layout}.pt")

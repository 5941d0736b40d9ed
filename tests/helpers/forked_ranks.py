"""Whole trainings on forked ranks."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.monitoring.metrics import MetricWriter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.trainer import train
from helpers.evaluators import Scores


def train_in_ranks(config: Config, world_size: int) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Train; return losses by step, and the final weights under open_clip's names."""
    run_ranks(world_size, _train, config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    return losses, torch.load(config.run_dir / "weights.pt")


def _train(config: Config) -> None:
    mesh = Mesh.create(config.parallel)

    def keep_weights(model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        weights = to_open_clip(model)
        if mesh.rank == 0:
            torch.save(weights, Path(config.run_dir) / "weights.pt")
        return {}

    train(config, mesh, Scores(keep_weights))
    mesh.close()

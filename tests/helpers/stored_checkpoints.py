"""Checkpoints written without training, in the layouts of many ranks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ds_linclip.checkpoint.directory import checkpoint_path
from ds_linclip.checkpoint.sharded_safetensors import (
    StoredPiece,
    sha256_of,
    write_manifest,
    write_shard,
)
from ds_linclip.config import Config, save_config
from ds_linclip.model import CLIP

VERSIONS = {"torch": "2.11.0", "deepspeed": "0.19.8"}


def random_weights(model: CLIP) -> dict[str, Tensor]:
    """Return weights unlike the initial ones, by our names; a logit scale above 1."""
    weights = {name: 0.05 * torch.randn(p.shape) for name, p in model.named_parameters()}
    return weights | {"logit_scale": weights["logit_scale"].abs()}


def split_dims(model: CLIP) -> dict[str, int | None]:
    """Return the dimension of each parameter that tensor parallelism splits."""
    return {
        name: vars(p)["partition_dim"] if vars(p).get("tensor_model_parallel") else None
        for name, p in model.named_parameters()
    }


def write_checkpoint(
    config: Config,
    kinds: Mapping[str, Mapping[str, Tensor]],
    split: Mapping[str, int | None],
    *,
    step: int = 6,
    tp: int = 1,
    shards: int = 1,
) -> Path:
    """Write a checkpoint of ``tp x shards`` ranks that share every parameter evenly, as ZeRO does.

    Args:
        config: The run's configuration.
        kinds: The whole parameters by our names, for each of "weight", "ema", ...; a parameter that
            has only a weight is locked.
        split: The result of :func:`split_dims`.
        step: The step of the checkpoint.
        tp: The number of tensor-parallel ranks.
        shards: The number of ranks that share what each of these holds.
    """
    path = checkpoint_path(config.run_dir / "checkpoints", step)
    path.mkdir(parents=True)
    ranks = [dict[str, Tensor]() for _ in range(tp * shards)]
    pieces = []
    for name, weight in kinds["weight"].items():
        there = [kind for kind in kinds if name in kinds[kind]]
        dim = split[name]
        for tp_rank in range(tp if dim is not None else 1):
            shape = weight.shape if dim is None else weight.chunk(tp, dim)[tp_rank].shape
            cuts = [shape.numel() * i // shards for i in range(shards + 1)]
            for shard in range(shards):
                start, end = cuts[shard], cuts[shard + 1]
                if start == end:
                    continue
                rank = shard * tp + tp_rank
                for kind in there:
                    whole = kinds[kind][name]
                    mine = whole if dim is None else whole.chunk(tp, dim)[tp_rank]
                    ranks[rank][f"{kind}/{name}"] = mine.reshape(-1)[start:end]
                piece = StoredPiece(
                    name=name,
                    numel=end - start,
                    split_dim=dim,
                    tp_rank=tp_rank,
                    start=start,
                    shape=list(shape),
                    kinds=there,
                    file=f"rank-{rank:05d}.safetensors",
                )
                pieces.append(piece)
    files = {f"rank-{r:05d}.safetensors": tensors for r, tensors in enumerate(ranks)}
    written = {name: write_shard(path / name, files[name]) for name in files}
    save_config(config, path / "config.yaml")
    size = (path / "config.yaml").stat().st_size
    written["config.yaml"] = {"size": size, "sha256": sha256_of(path / "config.yaml")}
    content = {
        "step": step,
        "layout": {"dp": shards, "tp": tp, "pp": 1, "cp": 1, "zero": 1},
        "files": written,
        "versions": VERSIONS,
    }
    write_manifest(path, content, pieces)
    return path

"""Ranks that are forked from a process that has imported everything: a second or two per start."""

import json
import logging
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.metrics import MetricWriter
from ds_linclip.model import CLIP
from ds_linclip.model.open_clip_exchange import to_open_clip
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train


def run_ranks(world_size: int, fn: Callable[..., object], *arguments: Any) -> None:
    """Run ``fn(*arguments)``, which can be pickled, on so many gloo ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["forked_ranks"])
    ranks = [
        server.Process(target=_rank, args=(rank, world_size, port, fn, *arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * world_size


def train_in_ranks(config: Config, world_size: int) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Losses by step, and the final weights under open_clip's names."""
    run_ranks(world_size, _train, config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    return losses, torch.load(config.run_dir / "weights.pt")


def _rank(
    rank: int, world_size: int, port: int, fn: Callable[..., object], *arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    fn(*arguments)


def _train(config: Config) -> None:
    mesh = Mesh.create(config.parallel)

    def keep_weights(model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        weights = to_open_clip(model)
        if mesh.rank == 0:
            torch.save(weights, Path(config.run_dir) / "weights.pt")
        return {}

    train(config, mesh, keep_weights)
    mesh.close()

"""Train one tiny model in every parallel layout and compare: ``python launch/check_layouts.py``.

Same seed, same global batches, fp32. For each layout: the largest relative difference of a loss and
of a weight tensor from the single process. Writes ``layouts.csv`` and ``summary.md``; exit code 1
when a difference is greater than 1e-5.
"""

import argparse
import csv
import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_linclip.config import Config, load_config
from ds_linclip.metrics import MetricWriter
from ds_linclip.model import CLIP
from ds_linclip.model.open_clip_exchange import to_open_clip
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train

TOLERANCE = 1e-5
EMBEDDED = Path(__file__).parents[1] / "ds_configs" / "train" / "embedded.yaml"


@dataclass(frozen=True)
class Result:
    """What a run gave: losses by step, and the final weights under open_clip's names."""

    losses: dict[int, float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; ranks are their product."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    zero: int = 1
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def name(self) -> str:
        axes = [f"{axis}{getattr(self, axis)}" for axis in ("tp", "pp", "cp", "dp")]
        shown = [axis for axis in axes if not axis.endswith("1")] or ["1"]
        shown += [f"zero{self.zero}"] if self.dp > 1 or self.zero > 1 else []
        shown += [f"micro{self.micro_batches}"] if self.micro_batches > 1 else []
        return " ".join(shown)

    def overrides(self, batch: int) -> list[str]:
        sizes = [f"parallel.{axis}={getattr(self, axis)}" for axis in ("tp", "pp", "dp", "cp")]
        micro_batch = batch // self.dp // self.micro_batches
        return [*sizes, f"zero.stage={self.zero}", f"train.micro_batch_size={micro_batch}"]


LAYOUTS = [
    Layout(),
    Layout(micro_batches=2),
    Layout(micro_batches=8),
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, micro_batches=2),
    Layout(pp=2, micro_batches=8),
    Layout(dp=2, zero=1),
    Layout(dp=2, zero=2, micro_batches=2),
    Layout(dp=2, zero=3, micro_batches=2),
    Layout(cp=2),
    Layout(tp=2, pp=2, micro_batches=2),
    Layout(tp=2, dp=2, zero=1),
    Layout(tp=2, dp=2, zero=2),
    Layout(tp=2, dp=2, zero=3),
    Layout(pp=2, dp=2, micro_batches=2),
    Layout(cp=2, dp=2, zero=3),
    Layout(tp=2, pp=2, dp=2, micro_batches=2),
    Layout(tp=2, pp=2, cp=2, micro_batches=2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for the embedded config, such as data.train")
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default: none are written"
    )
    parser.add_argument("--layouts", nargs="+", help="names of layouts, as in the table")
    parser.add_argument("--attention", nargs="+", default=["linear", "softmax"])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_intermixed_args()
    worst = 0.0
    rows = []
    for attention in arguments.attention:
        reference: Result | None = None
        for layout in LAYOUTS:
            if arguments.layouts and layout.name not in ["1", *arguments.layouts]:
                continue
            if attention == "softmax" and layout.cp > 1:
                continue
            begun = time.perf_counter()
            result = run(layout, attention, arguments.steps, arguments.overrides)
            reference = reference or result
            loss, weights, name = differences(result, reference)
            worst = max(worst, loss, weights)
            rows.append((attention, layout.name, layout.ranks, loss, weights))
            print(
                f"{attention:8} {layout.name:24} loss {loss:.1e} weights {weights:.1e} "
                f"({name}) {time.perf_counter() - begun:.1f} s",
                flush=True,
            )
    if arguments.out:
        write(arguments.out, rows)
    return 0 if worst <= TOLERANCE else 1


def run(layout: Layout, attention: str, steps: int, overrides: list[str]) -> Result:
    """Train in processes of their own; losses by step and the final weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            EMBEDDED,
            [
                *overrides,
                *(f"output_dir={folder}", "name=run", f"train.steps={steps}", "eval.data=null"),
                *("train.global_batch_size=32", "data.num_workers=0", "log.every_steps=1"),
                *("log.tensorboard=false", "optim.warmup_steps=2", "checkpoint.every_steps=1000"),
                *(f"model.{t}.attention.kind={attention}" for t in ("vision", "text")),
                *layout.overrides(32),
            ],
        )
        return run_ranks(config, layout.ranks)


def run_ranks(config: Config, world_size: int) -> Result:
    """Train as ``config`` says in ranks that are forked from this process.

    Raises:
        RuntimeError: when one fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=train_rank, args=(rank, world_size, port, config))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{config.name}: a rank failed")
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    return Result(losses, torch.load(config.run_dir / "weights.pt"))


def train_rank(rank: int, world_size: int, port: int, config: Config) -> None:
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

    def keep_weights(model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        weights = to_open_clip(model)
        if rank == 0:
            torch.save(weights, config.run_dir / "weights.pt")
        return {}

    mesh = Mesh.create(config.parallel)
    train(config, mesh, keep_weights)
    mesh.close()


def differences(result: Result, reference: Result) -> tuple[float, float, str]:
    """Largest relative difference of a loss, and of a weight tensor (RMS) with its name."""
    assert result.losses.keys() == reference.losses.keys()
    assert result.weights.keys() == reference.weights.keys()
    loss = max(abs(result.losses[step] / it - 1) for step, it in reference.losses.items())
    found = {name: relative_rms(result.weights[name], it) for name, it in reference.weights.items()}
    name = max(found, key=lambda name: found[name])
    return loss, found[name], name


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def write(folder: Path, rows: list[tuple[str, str, int, float, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = ("attention", "layout", "ranks", "loss", "weights")
    with (folder / "layouts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())

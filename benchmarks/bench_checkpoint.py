"""What saving and loading costs a run, against DeepSpeed's own checkpoints: ``make
bench-checkpoint``.

ViT-B/16 with its text tower, AdamW, fp32, two data-parallel ranks under ZeRO-1. Saving: seconds
that training waits. Loading: by the same ranks, and by one rank, for which DeepSpeed first converts
to its universal form. Writes ``checkpoint.csv``, ``checkpoint.png`` and ``summary.md`` into
``docs/results/checkpoint/<device>``.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import REPOSITORY
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config, load_config
from ds_linclip.engine.engine import Engine
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.provenance import commit_of, device_name, folder_name

MEASURED = ("ds_linclip/checkpoint", "ds_linclip/engine", "benchmarks/bench_checkpoint.py")
REPETITIONS = 3
BATCH = 4


@dataclass(frozen=True)
class Row:
    """Median seconds of one action, here and in DeepSpeed."""

    action: str
    ours: float
    deepspeed: float

    @property
    def ratio(self) -> float:
        return self.deepspeed / self.ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: docs/results/checkpoint/<device>")
    arguments = parser.parse_args()
    name = device_name("cpu")
    output = arguments.out or REPOSITORY / "docs/results/checkpoint" / folder_name(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_ranks(2, save_and_load, folder)
        run_ranks(1, load_on_one, folder)
        seconds: dict[str, Any] = {}
        for path in sorted(folder.glob("*.json")):
            seconds |= json.loads(path.read_text())
    rows = [
        Row("training waits for a save", seconds["asynchronous"], seconds["ds_save"]),
        Row("a save is on the disk", seconds["synchronous"], seconds["ds_save"]),
        Row("load, same ranks", seconds["load"], seconds["ds_load"]),
        Row(
            "load on one rank instead of two",
            seconds["load_on_one"],
            seconds["ds_convert"] + seconds["ds_load_on_one"],
        ),
    ]
    write(output, rows, seconds, name)
    print((output / "summary.md").read_text())
    return 0


def save_and_load(folder: Path) -> None:
    """Two ranks."""
    mesh, config = Mesh.create(), make_config(folder)
    engine, batch = make_engine(config, mesh), make_batch()
    steps = [timed(mesh, lambda: engine.step(batch, lr=1e-4)) for _ in range(REPETITIONS + 1)]
    config.checkpoint.asynchronous = False
    sync = CheckpointManager(config, mesh, {})
    synchronous = [timed(mesh, lambda n=n: sync.save(engine, n, {})) for n in range(4)]
    config.checkpoint.asynchronous = True
    store = CheckpointManager(config, mesh, {})
    waits, beside = [], []
    for number in range(10, 10 + REPETITIONS + 1):
        waits.append(timed(mesh, lambda n=number: store.save(engine, n, {})))
        beside.append(timed(mesh, lambda: engine.step(batch, lr=1e-4)))
        store.wait()
    newest = store.newest()
    assert newest is not None
    theirs = engine.deepspeed_engine
    save = timed_often(
        mesh, lambda: theirs.save_checkpoint(str(folder / "deepspeed"), tag="x", save_latest=False)
    )

    def load() -> None:
        store.load(engine, store.newest() or newest)

    seconds = {
        "step": statistics.median(steps[1:]),
        "step_beside_a_save": statistics.median(beside[1:]),
        "synchronous": statistics.median(synchronous[1:]),
        "asynchronous": statistics.median(waits[1:]),
        "ds_save": save,
        "load": timed_often(mesh, load),
        "ds_load": timed_often(
            mesh, lambda: theirs.load_checkpoint(str(folder / "deepspeed"), tag="x")
        ),
        "ranks_bytes": sum(p.stat().st_size for p in newest.iterdir()),
    }
    if mesh.rank == 0:
        (folder / "two.json").write_text(json.dumps(seconds))
    mesh.close()


def load_on_one(folder: Path) -> None:
    """One rank loads what two have saved."""
    mesh, config = Mesh.create(), make_config(folder)
    engine = make_engine(config, mesh)
    store = CheckpointManager(config, mesh, {})
    newest = store.newest()
    assert newest is not None
    theirs, universal = engine.deepspeed_engine, folder / "universal"
    convert = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    folders = ["--input_folder", folder / "deepspeed" / "x", "--output_folder", universal / "x"]
    begun = time.perf_counter()
    subprocess.run([*convert, *map(str, folders)], check=True, capture_output=True)
    converted = time.perf_counter() - begun
    seconds = {
        "load_on_one": timed_often(mesh, lambda: store.load(engine, store.newest() or newest)),
        "ds_convert": converted,
    }
    theirs._config.load_universal_checkpoint = True
    seconds["ds_load_on_one"] = timed(mesh, lambda: theirs.load_checkpoint(str(universal), tag="x"))
    (folder / "one.json").write_text(json.dumps(seconds))
    shutil.rmtree(universal)
    mesh.close()


def make_config(folder: Path) -> Config:
    overrides = [
        *(f"output_dir={folder}", "name=run", "train.precision=fp32", "data.train=[unused.tar]"),
        *("model.vision.image_size=64", f"train.global_batch_size={2 * BATCH}", "train.steps=100"),
        *("optim.warmup_steps=1", "log.tensorboard=false", "checkpoint.keep_last=1"),
    ]
    return load_config(REPOSITORY / "ds_configs" / "train" / "vit_b16.yaml", overrides)


def make_engine(config: Config, mesh: Mesh) -> Engine:
    torch.manual_seed(0)
    model = CLIP(config.model, mesh)
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    engine.step(make_batch(2 * BATCH // mesh.dp.size), lr=1e-4)  # makes the optimizer's state
    return engine


def make_batch(size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(size, 3, 64, 64), torch.ones(size, 77, dtype=torch.int64)


def timed(mesh: Mesh, action: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    mesh.barrier()
    begun = time.perf_counter()
    action()
    mesh.barrier()
    return time.perf_counter() - begun


def timed_often(mesh: Mesh, action: Callable[[], object]) -> float:
    """The median, after a first time that does not count."""
    return statistics.median([timed(mesh, action) for _ in range(REPETITIONS + 1)][1:])


def write(output: Path, rows: list[Row], seconds: dict[str, Any], name: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with (output / "checkpoint.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(asdict(row).values() for row in rows)
    lines = [
        "# Checkpoints against DeepSpeed's",
        "",
        f"`make bench-checkpoint` on {name}, two gloo ranks, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit_of(MEASURED)}, torch "
        f"{version('torch')}, deepspeed {version('deepspeed')}. ViT-B/16 and its text tower, fp32, "
        f"AdamW, ZeRO-1: {seconds['ranks_bytes'] / 2**20:.0f} MiB on the disk. Medians of "
        f"{REPETITIONS}; ours are synced to the disk, hashed, and verified before they are loaded, "
        "DeepSpeed's are not.",
        "",
        "| | ours, s | DeepSpeed, s | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {r.action} | {r.ours:.2f} | {r.deepspeed:.2f} | {r.ratio:.1f} |" for r in rows),
        "",
        f"A step takes {seconds['step']:.2f} s, and {seconds['step_beside_a_save']:.2f} s while a "
        "checkpoint is being written beside it by the same two cores.",
        "DeepSpeed's conversion to its universal form is "
        f"{seconds['ds_convert']:.1f} s of the last row.",
        "",
        "![seconds](checkpoint.png)",
    ]
    (output / "summary.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [r.ours for r in rows], 0.4, label="ours", color="#2563a8")
    axes.barh(
        [p + 0.2 for p in places],
        [r.deepspeed for r in rows],
        0.4,
        label="DeepSpeed",
        color="#d97706",
    )
    axes.set_yticks(places, [row.action for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output / "checkpoint.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())

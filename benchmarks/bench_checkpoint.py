"""The cost of saving and loading, against DeepSpeed's own checkpoints: ``make bench-checkpoint``.

ViT-B/16 with its text tower, AdamW, fp32, two data-parallel ranks under ZeRO-1. Saving: seconds
that training waits. Loading: by the same ranks, and by one rank, for which DeepSpeed first converts
to its universal form. Writes ``checkpoint.csv``, ``checkpoint.png`` and ``summary.md`` into
``docs/results/checkpoint/<device>``.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import REPOSITORY, BenchmarkParser, measure_on_ranks
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config, load_config
from ds_linclip.engine.engine import Engine
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.plotting import LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report

MEASURED = ("ds_linclip/checkpoint", "ds_linclip/engine", "benchmarks/bench_checkpoint.py")
REPETITIONS = 3
BATCH = 4


def main() -> int:
    parser = BenchmarkParser("checkpoint", __doc__, "--out")
    output, facts = parser.begin(parser.parse_args(), "cpu", MEASURED, ("torch", "deepspeed"))
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure_on_ranks(2, save_and_load, Path(folder))[0]
        seconds |= measure_on_ranks(1, load_on_one, Path(folder))[0]
    on_one = seconds["ds_convert"] + seconds["ds_load_on_one"]
    pairs = (
        ("training waits for a save", seconds["asynchronous"], seconds["ds_save"]),
        ("a save is on the disk", seconds["synchronous"], seconds["ds_save"]),
        ("load, same ranks", seconds["load"], seconds["ds_load"]),
        ("load on one rank instead of two", seconds["load_on_one"], on_one),
    )
    cells = [[action, f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}"] for action, a, b in pairs]
    summary = write_report(
        output,
        title="Checkpoints against DeepSpeed's",
        sections=[
            "ViT-B/16 and its text tower, fp32, AdamW, ZeRO-1, two gloo ranks: "
            f"{seconds['ranks_bytes'] / 2**20:.0f} MiB on the disk. Medians of {REPETITIONS}; ours "
            "are synced to the disk, hashed, and verified before they are loaded, DeepSpeed's are "
            "not.",
            markdown_table(["", "ours, s", "DeepSpeed, s", "ratio"], cells),
            f"A step takes {seconds['step']:.2f} s, and {seconds['step_beside_a_save']:.2f} s "
            "while a checkpoint is being written beside it by the same two cores. DeepSpeed's "
            f"conversion to its universal form is {seconds['ds_convert']:.1f} s of the last row.",
            "![seconds](checkpoint.png)",
        ],
        facts=facts,
        tables={"checkpoint.csv": [{"action": n, "ours": a, "deepspeed": b} for n, a, b in pairs]},
        figures={"checkpoint.png": _draw(pairs)},
    )
    print(summary)
    return 0


def save_and_load(folder: Path) -> dict[str, float]:
    """Measure saves and loads on two ranks."""
    mesh, config = Mesh.create(), make_config(folder)
    engine, batch = make_engine(config, mesh), make_batch()
    train = partial(engine.step, batch, lr=1e-4)
    step = median_time(mesh, train)
    config.checkpoint.asynchronous = False
    sync, numbers = CheckpointManager(config, mesh, {}), itertools.count()
    synchronous = median_time(mesh, lambda: sync.save(engine, next(numbers), {}))
    config.checkpoint.asynchronous = True
    store = CheckpointManager(config, mesh, {})
    waits, beside = [], []
    for number in range(10, 10 + REPETITIONS + 1):
        waits.append(timed(mesh, partial(store.save, engine, number, {})))
        beside.append(timed(mesh, train))
        store.wait()
    theirs, path = engine.deepspeed_engine, str(folder / "deepspeed")
    seconds = {
        "step": step,
        "step_beside_a_save": statistics.median(beside[1:]),
        "synchronous": synchronous,
        "asynchronous": statistics.median(waits[1:]),
        "ds_save": median_time(mesh, partial(theirs.save_checkpoint, path, "x", save_latest=False)),
        "load": median_time(mesh, partial(load_newest, store, engine)),
        "ds_load": median_time(mesh, partial(theirs.load_checkpoint, path, "x")),
        "ranks_bytes": sum(file.stat().st_size for file in store.last.iterdir()),
    }
    mesh.close()
    return seconds


def load_on_one(folder: Path) -> dict[str, float]:
    """Measure loads on one rank of what two have saved."""
    mesh, config = Mesh.create(), make_config(folder)
    engine = make_engine(config, mesh)
    store = CheckpointManager(config, mesh, {})
    theirs, universal = engine.deepspeed_engine, folder / "universal"
    module = "deepspeed.checkpoint.ds_to_universal"
    convert = [sys.executable, "-m", module, "--inject_missing_state"]
    convert += ["--input_folder", str(folder / "deepspeed" / "x")]
    convert += ["--output_folder", str(universal / "x")]
    run = partial(subprocess.run, convert, check=True, capture_output=True)
    seconds = {
        "load_on_one": median_time(mesh, partial(load_newest, store, engine)),
        "ds_convert": timed(mesh, run),
    }
    theirs._config.load_universal_checkpoint = True
    load = partial(theirs.load_checkpoint, str(universal), "x")
    seconds["ds_load_on_one"] = timed(mesh, load)
    mesh.close()
    return seconds


def load_newest(store: CheckpointManager, engine: Engine) -> None:
    newest = store.newest()
    assert newest is not None
    store.load(engine, newest)


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
    """Return the seconds until all ranks have done it."""
    mesh.barrier()
    start = time.perf_counter()
    action()
    mesh.barrier()
    return time.perf_counter() - start


def median_time(mesh: Mesh, action: Callable[[], object]) -> float:
    """Return the median time, after a first time that does not count."""
    return statistics.median([timed(mesh, action) for _ in range(REPETITIONS + 1)][1:])


def _draw(pairs: Sequence[tuple[str, float, float]]) -> Figure:
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    for column, label, colour in ((1, "ours", LINEAR), (2, "DeepSpeed", SOFTMAX)):
        places = [place - 0.6 + 0.4 * column for place in range(len(pairs))]
        values = [pair[column] for pair in pairs]
        axes.barh(places, values, 0.4, label=label, color=colour)
    dress(axes, "seconds")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(pairs)), [action for action, *_ in pairs])
    axes.invert_yaxis()
    add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


if __name__ == "__main__":
    sys.exit(main())

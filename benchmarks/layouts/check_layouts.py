"""Train one tiny model in every parallel layout and compare:
``python -m benchmarks.layouts.check_layouts``.

Same seed, same global batches, fp32. Shown for each layout: the largest relative difference of a
loss, and of a weight tensor (RMS), from the single process; the bytes that ranks exchange in a
step, by axis, and how far they are from the plan. Exit code 1 when a difference is greater than
1e-5, or traffic differs by more than control messages.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import REPOSITORY, benchmark_facts, measure_on_ranks
from benchmarks.attention.zoo import ZOO, overrides_of, settings_of
from benchmarks.memory.bench_memory import random_batch
from benchmarks.traffic import CONTROL_BYTES, TrafficMeter
from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.monitoring.metrics import MetricWriter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import plan_rank
from ds_linclip.process.phase import PhaseTracker
from ds_linclip.trainer import train
from linclip_eval.results import markdown_table, write_report
from linclip_kernels.linear_attention.reference import relative_rms

MEASURED = ("ds_linclip", "benchmarks")
TOLERANCE = 1e-5
BATCH = 32
#: Columns of bytes: mesh axes, "dp" (the gather of the loss) and "zero".
AXES = ("tp", "cp", "pp", "dp", "zero")
#: Sizes of the mesh axes, which are 1 where they are not named, ZeRO's stage, micro-batches.
LAYOUTS = (
    *("single", "single-micro2", "single-micro8", "tp2", "pp2", "pp2-micro2", "pp2-micro8"),
    *("dp2-zero1", "dp2-zero2-micro2", "dp2-zero3-micro2", "cp2", "tp2-pp2-micro2"),
    *("tp2-dp2-zero1", "tp2-dp2-zero2", "tp2-dp2-zero3", "pp2-dp2-zero1-micro2"),
    *("cp2-dp2-zero3", "tp2-pp2-dp2-zero1-micro2", "tp2-pp2-cp2-micro2"),
)


class RankResult(NamedTuple):
    """What a rank has after a run.

    Attributes:
        losses: Loss by step.
        weights: Final weights under open_clip's names.
        traffic: Measured bytes of a step by axis.
        planned: The planner's bytes of a step by axis.
    """

    losses: dict[int, float]
    weights: dict[str, Tensor]
    traffic: dict[str, int]
    planned: dict[str, int]


#: A line of layouts.csv; bytes are those of the rank that exchanges most of them.
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for the embedded config, such as data.train")
    parser.add_argument("--out", type=Path, help="folder for layouts.csv and summary.md")
    parser.add_argument("--layouts", nargs="+", help=", ".join(LAYOUTS))
    parser.add_argument(
        "--attention", nargs="+", default=["eq7", "softmax"], choices=ZOO, metavar="NAME"
    )
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_intermixed_args()
    rows = []
    for attention in arguments.attention:
        reference: RankResult | None = None
        for layout in LAYOUTS:
            if reference and arguments.layouts and layout not in arguments.layouts:
                continue
            settings = settings_of(attention)
            if "cp" in layout and (not settings.splits_tokens or settings.needs_grid):
                continue
            start = time.perf_counter()
            ranks = run(layout, attention, arguments.steps, arguments.overrides)
            reference = reference or ranks[0]
            row = compare(ranks, reference)
            rows.append({"attention": attention, "layout": layout, "ranks": len(ranks), **row})
            print(
                f"{attention:12} {layout:24} loss {row['loss_difference']:.1e} "
                f"weights {row['weight_difference']:.1e} bytes off plan {row['bytes_off_plan']:4} "
                f"{'good' if is_good(row) else 'NOT GOOD':8} {time.perf_counter() - start:5.1f} s",
                flush=True,
            )
            if arguments.out:
                write(arguments.out, rows, arguments.steps)
    return 0 if all(map(is_good, rows)) else 1


def run(layout: str, attention: str, steps: int, overrides: Sequence[str]) -> list[RankResult]:
    """Train in processes of their own; return the result of every rank."""
    sizes = dict.fromkeys(("dp", "zero", "micro"), 1)
    sizes |= {name: int(size) for name, size in re.findall(r"([a-z]+)(\d)", layout)}
    micro_batch = BATCH // sizes["dp"] // sizes.pop("micro")
    stage = sizes.pop("zero")
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            REPOSITORY / "ds_configs" / "train" / "embedded.yaml",
            [
                *overrides,
                *(f"output_dir={folder}", "name=run", f"train.steps={steps}", "eval.data=null"),
                *(f"train.global_batch_size={BATCH}", "data.num_workers=0", "log.every_steps=1"),
                *("log.tensorboard=false", f"optim.warmup_steps={min(10, steps // 2)}"),
                "checkpoint.every_steps=1000",
                # The bias of softmax's keys has no gradient but rounding: with a small eps Adam
                # would take it for one.
                *("optim.lr=3e-4", "optim.eps=1e-4"),
                *overrides_of(attention),
                *(f"parallel.{axis}={size}" for axis, size in sizes.items()),
                *(f"zero.stage={stage}", f"train.micro_batch_size={micro_batch}"),
            ],
        )
        return measure_on_ranks(math.prod(sizes.values()), train_rank, config)


class KeepWeights:
    """An evaluator that keeps the weights and scores nothing."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.metrics: Mapping[str, Literal["max", "min"]] = {}

    def rehearse(self, model: CLIP, phases: PhaseTracker) -> None:
        pass

    def __call__(self, model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        self.weights.update(to_open_clip(model))
        return {}


def train_rank(config: Config) -> RankResult:
    mesh = Mesh.create(config.parallel)
    evaluator = KeepWeights()
    train(config, mesh, evaluator)
    traffic = traffic_of_a_step(config, mesh)
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    mesh.close()
    return RankResult(losses, evaluator.weights, *traffic)


def traffic_of_a_step(config: Config, mesh: Mesh) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes by axis that this rank exchanges in a step: measured, and planned."""
    # Nothing is fetched ahead: ZeRO-3 keeps what it has fetched for two uses, and gathers it once.
    settings = Path(config.output_dir, f"deepspeed-{mesh.rank}.json")
    settings.write_text('{"zero_optimization": {"stage3_prefetch_bucket_size": 0}}')
    config.zero.deepspeed_config = str(settings)
    units = stage_units(config, mesh.pp)
    model = CLIP(config.model, mesh, loss=config.loss.kind, units=units)
    plan = plan_rank(config, mesh)
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    batch, vision = random_batch(config, mesh), config.model.vision
    if vision.patch_dropout:
        kept = torch.arange(vision.num_kept_patches_at(vision.image_size))
        batch = *batch, kept.expand(len(batch[0]), -1)
    for _ in range(2):  # the first steps also send shapes, and learn the order of parameters
        engine.step(batch, lr=1e-3)
    axes = {"tp": mesh.tp, "cp": mesh.cp, "pp": mesh.pp, "dp": mesh.dp, "zero": mesh.replicas}
    with TrafficMeter({name: axis.group for name, axis in axes.items()}) as meter:
        engine.step(batch, lr=1e-3)
    return dict(meter.bytes), plan.traffic


def compare(ranks: Sequence[RankResult], reference: RankResult) -> Row:
    """Return how far a run is from the reference, and its traffic from the plan."""
    losses, weights, *_ = ranks[0]
    assert losses.keys() == reference.losses.keys()
    assert weights.keys() == reference.weights.keys()
    off_plan = [
        abs(rank.traffic.get(axis, 0) - rank.planned.get(axis, 0))
        for rank in ranks
        for axis in rank.traffic.keys() | rank.planned.keys()
    ]
    return {
        "loss_difference": max(abs(losses[n] / loss - 1) for n, loss in reference.losses.items()),
        "weight_difference": max(
            relative_rms(weights[name], weight) for name, weight in reference.weights.items()
        ),
        **{f"{axis}_bytes": max(rank.traffic.get(axis, 0) for rank in ranks) for axis in AXES},
        "bytes_off_plan": max(off_plan, default=0),
    }


def is_good(row: Row) -> bool:
    exact = max(row["loss_difference"], row["weight_difference"]) <= TOLERANCE
    return exact and row["bytes_off_plan"] < CONTROL_BYTES


def write(folder: Path, rows: Sequence[Row], steps: int) -> None:
    """Write layouts.csv and summary.md."""
    header = ["attention", "layout", "ranks", "loss", "weights", "tp", "cp", "pp", "loss gather"]
    cells = [
        [
            *(row[name] for name in ("attention", "layout", "ranks")),
            *(f"{row[name]:.1e}" for name in ("loss_difference", "weight_difference")),
            *(f"{row[f'{axis}_bytes']:,}" for axis in AXES),
            row["bytes_off_plan"],
        ]
        for row in rows
    ]
    write_report(
        folder,
        title="The same training in every layout",
        sections=[
            f"{steps} steps of {BATCH} pairs of the embedded model in fp32. Differences are "
            "relative, from the single process: the largest of a loss, and of a final weight "
            "tensor (RMS). Bytes: of a step, on the rank that has most of them; the last column "
            "is how far any rank is from the plan (control messages of less than "
            f"{CONTROL_BYTES} bytes are not counted).",
            markdown_table([*header, "ZeRO", "off"], cells, align="ll" + "r" * 9),
        ],
        facts=benchmark_facts("cpu", MEASURED, ("torch", "deepspeed")),
        tables={"layouts.csv": rows},
    )


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a rank against the plan: ``python -m benchmarks.memory.bench_memory [OUTPUT_FOLDER]``.

Trains ViT-B/16 (ds_configs/train/vit_b16.yaml) with one pair per rank at ZeRO-1, 2 and 3, forking
the gloo ranks of each layout from this process, and counts what lives between steps and at the
fullest moment of one: tensors, and the memory of the process. Prints summary.md and writes it,
memory.csv (one row per rank) and memory.png into OUTPUT_FOLDER. Exit codes: 0 measured, 1 tensors
between steps are not what is planned, 2 bad arguments.
"""

import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product

import psutil
import torch
from torch.profiler import record_function

from benchmarks import REPOSITORY, BenchmarkParser, measure_on_ranks
from benchmarks.memory.allocator_record import AllocatorRecord, live_bytes
from benchmarks.memory.report import Row, is_as_planned, layout_name, write_memory_report
from benchmarks.peak_memory import PeakMemory
from ds_linclip.config import Config, load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import plan_rank

MEASURED = ("ds_linclip/parallel", "ds_linclip/engine", "ds_linclip/planner", "benchmarks/memory")
#: Kinds of tensors that live between steps.
KINDS = ("weights", "gradients", "optimizer", "buckets")
#: The first steps make the optimizer's state, and let ZeRO-3 learn the order of parameters.
WARMUP = 2
#: Below it malloc recycles memory without giving it back, and resident memory says little.
MMAP_THRESHOLD = 1 << 20
#: A model of the embedded data's size without its large embedding.
QUICK = [
    *("model.vision.image_size=32", "model.vision.patch_size=16", "model.vision.layers=6"),
    *("model.vision.width=256", "model.text.layers=6", "model.text.width=64"),
    *("model.text.heads=2", "model.embed_dim=64", "model.text.context_length=16"),
]
QUICK_ZERO = {
    "reduce_bucket_size": 1_000_000,
    "allgather_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1_000_000,
}


def main() -> int:
    start = time.monotonic()
    parser = BenchmarkParser("memory", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--layers", type=int, help="of both towers, for less memory")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1])
    parser.add_argument("--quick", action="store_true", help="a tiny model on two ranks")
    arguments = parser.parse_args()
    output, facts = parser.begin(arguments, "cpu", MEASURED, ("torch", "deepspeed"))
    overrides = list(QUICK) if arguments.quick else []
    if arguments.layers:
        overrides += [f"model.{tower}.layers={arguments.layers}" for tower in ("vision", "text")]
    rows: list[Row] = []
    all_ranks = [2] if arguments.quick else arguments.ranks
    for precision, micro_batches, ranks, stage in product(
        arguments.precisions, arguments.micro_batches, all_ranks, arguments.stages
    ):
        layout = [f"train.precision={precision}", f"zero.stage={stage}", "train.micro_batch_size=1"]
        layout.append(f"train.global_batch_size={ranks * micro_batches}")
        rows += run(ranks, [*overrides, *layout], QUICK_ZERO if arguments.quick else None)
        print(f"{layout_name(rows[-1])}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    facts["overrides"] = " ".join(overrides) or "none"
    facts["duration"] = f"{time.monotonic() - start:.0f} s"
    print(write_memory_report(output, facts, rows))
    return 0 if is_as_planned(rows) else 1


def run(ranks: int, overrides: Sequence[str], zero: dict[str, int] | None = None) -> list[Row]:
    """Train a few steps in processes of their own; return a row for every rank.

    Args:
        ranks: Number of processes, by default all on the data axis.
        overrides: Overrides of ds_configs/train/vit_b16.yaml.
        zero: DeepSpeed's own settings of ZeRO.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps({"zero_optimization": zero or {}}))
        file.flush()
        common = [f"zero.deepspeed_config={file.name}", "parallel.device=cpu", "eval.data=null"]
        vit_b16 = REPOSITORY / "ds_configs" / "train" / "vit_b16.yaml"
        config = load_config(vit_b16, [*common, f"parallel.dp={ranks}", *overrides])
        return measure_on_ranks(ranks, measure_rank, config)


def measure_rank(config: Config) -> Row:
    ctypes.CDLL(None).mallopt(-3, MMAP_THRESHOLD)  # M_MMAP_THRESHOLD
    mesh = Mesh.create(config.parallel)
    private_before = _private_bytes()
    plan = plan_rank(config, mesh)
    with AllocatorRecord() as record:
        model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
        model.recompute_activations(config.train.activation_checkpointing)
        engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
        batch = random_batch(config, mesh)
        for _ in range(WARMUP):
            engine.step(batch, lr=1e-3)
        ctypes.CDLL(None).malloc_trim(0)
        kept = _private_bytes() - private_before
        peak = PeakMemory("cpu")
        with record_function("a step"):
            engine.step(batch, lr=1e-3)
        growth = peak.growth()
        live = live_bytes(engine)
    row = {
        "ranks": mesh.world_size,
        "precision": config.train.precision,
        "stage": config.zero.stage,
        "micro_batches": config.num_micro_batches(mesh.dp.size),
        "rank": mesh.rank,
        "num_parameters": plan.num_parameters,
        "kept_planned": plan.kept,
        **{f"kept_{kind}": live[kind] for kind in (*KINDS, "other")},
        "kept_process": kept,
        **{f"step_{kind}_planned": plan.memory[kind] for kind in (*KINDS, "activations")},
        "step": record.most("a step"),
        "step_process": kept + growth,
    }
    mesh.barrier()
    mesh.close()
    return row


def random_batch(config: Config, mesh: Mesh) -> tuple[torch.Tensor, ...]:
    """Return images and texts; later stages of a pipeline get tensors without memory."""
    local, length = config.train.global_batch_size // mesh.dp.size, config.model.text.context_length
    images, texts = (local, 3, *config.model.vision.image_size), (local, length)
    if mesh.pp.rank > 0:
        return torch.zeros(()).expand(images), torch.zeros((), dtype=torch.int64).expand(texts)
    generator = torch.Generator().manual_seed(mesh.rank)
    vocabulary = config.model.text.vocab_size
    return (
        torch.randn(images, generator=generator),
        torch.randint(vocabulary, texts, generator=generator),
    )


def _private_bytes() -> int:
    """Return this process's memory without pages that it only reads from the one it forked from."""
    private: int = psutil.Process().memory_full_info().uss
    return private


if __name__ == "__main__":
    sys.exit(main())

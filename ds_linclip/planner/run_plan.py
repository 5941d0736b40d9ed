"""The plan of a whole run: layout, memory, data, time and disk space, without starting it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from ds_linclip.config import (
    Config,
    ParallelConfig,
    check_batch,
    check_ranks,
    check_steps,
    with_steps,
)
from ds_linclip.data import Storage, find_shards
from ds_linclip.model.flops import forward_flops, num_state_values, step_flops, training_flops
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.activations import meta_model
from ds_linclip.planner.device_specs import device_spec
from ds_linclip.planner.memory_model import value_bytes
from ds_linclip.planner.plan import RankPlan, describe, plan_rank
from ds_linclip.process.number_text import format_figure

__all__ = ["DEVICES", "Target", "plan_run"]

GIB = 2**30
#: Memory kept free on a GPU for what the plan does not count: the CUDA context, NCCL's buffers,
#: cuBLAS, fragmentation. A guess: no run on a GPU has been measured.
_RESERVE_GIB = 4.0
#: Assumed share of the peak rate, recomputed operations included. A guess as well.
_MFU = 0.35
#: Values of --device.
DEVICES = {
    "h100": device_spec("NVIDIA H100 80GB HBM3"),
    "h200": device_spec("NVIDIA H200"),
    "a100": device_spec("NVIDIA A100-SXM4-80GB"),
    "a100-40gb": device_spec("NVIDIA A100-SXM4-40GB"),
    "cpu": None,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machines that a run is planned for; fields are the options of ``linclip plan``.

    Attributes:
        devices: Number of devices, with one rank on each.
        device: A key of :data:`DEVICES`; None: a GPU, or the CPU if the config says so.
        device_memory_gib: Memory of one device, instead of the table's.
        peak_tflops: Peak rate of one device, instead of the table's.
        mfu: Share of the peak that is reached, recomputed operations included.
        num_samples: Samples in an epoch, if the shards cannot be read.
    """

    devices: int
    device: str | None = None
    device_memory_gib: float | None = None
    peak_tflops: float | None = None
    mfu: float | None = None
    num_samples: int | None = None


def plan_run(config: Config, target: Target) -> tuple[str, str | None]:
    """Plan a run for machines that need not be available.

    Returns:
        The whole plan, in Markdown, and why the run does not fit the devices, or None.

    Raises:
        ValueError: when the target is invalid, or the config does not fit the number of devices.
    """
    _check(target)
    is_cpu = (target.device or config.parallel.device) == "cpu"
    peak, memory = target.peak_tflops, target.device_memory_gib
    if spec := DEVICES[target.device or "cpu"]:
        flops = spec.fp32_flops if config.train.precision == "fp32" else spec.bf16_flops
        peak = peak or (flops and flops / 1e12)
        memory = memory or spec.memory_gib
    reserve = 0.0 if is_cpu else _RESERVE_GIB
    limit = memory and memory - reserve
    device = torch.device("cpu" if is_cpu else "cuda")
    dp_size = check_ranks(config.parallel, target.devices)
    check_batch(config, dp_size)
    samples, unknown = _epoch(config, target)
    config = with_steps(config, samples)
    if config.train.epochs is not None:
        raise ValueError(
            f"train.epochs ({config.train.epochs:g}) needs the samples of an epoch, {unknown}"
        )
    check_steps(config)
    plans, table = _plan_all(config, target.devices, device)
    fullest = max(range(len(plans)), key=lambda rank: sum(plans[rank].memory.values()))
    needed = sum(plans[fullest].memory.values()) / GIB
    rows = [
        ("memory", _memory_row(fullest, needed, limit, reserve)),
        ("batch", _batch_row(config, dp_size)),
        *_epoch_rows(config, samples, unknown),
        *_time_rows(config, dp_size, len(plans), peak, target.mfu or _MFU),
        ("checkpoint", _checkpoint_row(config)),
    ]
    name = target.device or ("cpu" if is_cpu else "GPU")
    summary = "\n".join(f"- {row}: {value}" for row, value in rows)
    problem = None
    if limit is not None and needed > limit:
        problem = _problem(config, plans[fullest], fullest, needed, limit, name)
    title = f"# {config.name}: plan for {len(plans)} x {name}"
    return f"{title}\n\n{summary}\n\n{table}", problem


def _check(target: Target) -> None:
    if target.device is not None and target.device not in DEVICES:
        raise ValueError(f"--device ({target.device}) must be one of {', '.join(DEVICES)}")
    for name, value in asdict(target).items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} ({value}) must be greater than 0 and finite")
    if target.mfu is not None and target.mfu > 1:
        raise ValueError(f"--mfu ({target.mfu}) must be at most 1: a share of the peak")


def _plan_all(config: Config, num_devices: int, device: torch.device) -> tuple[list[RankPlan], str]:
    """Return the plans of all ranks and their table.

    Ranks of one pipeline stage with the same tokens have the same plan; it is made once.
    """
    tp, cp, pp = config.parallel.tp, config.parallel.cp, config.parallel.pp
    found: dict[tuple[int, int], RankPlan] = {}
    stage = num_devices // pp
    for place in product(range(pp), range(cp)):
        rank = place[0] * stage + place[1] * tp
        with Mesh.planned(config.parallel, device, rank, num_devices) as mesh:
            found[place] = plan_rank(config, mesh)
    plans = [found[rank // stage, rank // tp % cp] for rank in range(num_devices)]
    return plans, describe(config, mesh, plans)


def _memory_row(rank: int, needed: float, limit: float | None, reserve: float) -> str:
    row = f"rank {rank} has most, {needed:.3g} GiB at the fullest moment of a step"
    if limit is None:
        return f"{row}; the device's memory is not known (--device, --device-memory-gib)"
    return f"{row}; a device has {limit:.3g} GiB for it, {reserve:g} GiB more are kept free"


def _batch_row(config: Config, dp_size: int) -> str:
    num = config.num_micro_batches(dp_size)
    size = config.train.global_batch_size // dp_size // num
    times = f"{num} micro-batches" if num > 1 else "a micro-batch"
    batch = f"{config.train.global_batch_size:,} pairs"
    return f"{batch}: {dp_size} data-parallel places x {times} of {size:,}"


def _epoch(config: Config, target: Target) -> tuple[int | None, str]:
    """Return the samples of an epoch; None, and why, if they are not known.

    If the shards cannot be read, ``num_samples`` of all sources counts.
    """
    if target.num_samples is not None:
        return target.num_samples, ""
    sources = config.data.train
    try:
        groups = find_shards(sources, Storage(config.data.cache, config.data.network))
        return sum(group.samples_per_epoch for group in groups), ""
    except ValueError as error:
        stated = [source.num_samples for source in sources]
        if config.train.epochs is not None and None not in stated:
            times = [source.upsampling for source in sources]
            return round(sum(n * t for n, t in zip(stated, times, strict=True) if n)), ""
        return None, f"unknown: {error}; --num-samples states it"


def _epoch_rows(config: Config, samples: int | None, unknown: str) -> list[tuple[str, str]]:
    if samples is None:
        return [("epoch", unknown)]
    steps = samples / config.train.global_batch_size
    return [
        ("epoch", f"{samples:,} samples, {steps:,.1f} steps"),
        ("run", f"{config.train.steps:,} steps, {config.train.steps / steps:,.2f} epochs"),
    ]


def _time_rows(
    config: Config, dp_size: int, num_devices: int, peak: float | None, mfu: float
) -> list[tuple[str, str]]:
    num, pp = config.num_micro_batches(dp_size), config.parallel.pp
    batch, model_flops = config.train.global_batch_size, step_flops(config, 0)
    forward = batch * forward_flops(config.model, config.image_size_at(0))
    passes = (num > 1 or pp > 1) + (config.train.activation_checkpointing == "full")
    recomputed = forward * passes
    operations = model_flops + recomputed
    row = f"{operations / 1e15:.3g} PFLOP, {recomputed / 1e15:.3g} of them recomputed"
    if peak is None:
        return [("step", f"{row}; the device's speed is not known (--device, --peak-tflops)")]
    # A pipeline waits for its first and its last micro-batch.
    bubble = (num + pp - 1) / num
    rate = num_devices * peak * 1e12 * mfu / bubble
    seconds = operations / rate
    whole = training_flops(config) * operations / model_flops / rate
    waits = f", of which a pipeline waits {1 - 1 / bubble:.0%}" if pp > 1 else ""
    return [
        (
            "step",
            f"{row}: {seconds:.3g} s at {mfu:g} of {peak:g} TFLOP/s per device (--mfu){waits}; "
            f"{format_figure(batch / seconds)} samples/s",
        ),
        ("whole run", f"{whole / 3600:.3g} hours, without saving and evaluation"),
    ]


def _checkpoint_row(config: Config) -> str:
    whole = replace(config, parallel=ParallelConfig())
    with Mesh.planned(whole.parallel, torch.device("cpu"), 0, 1) as mesh:
        trained, frozen = 4 * num_state_values(config.optim), value_bytes(config)
        parameters = meta_model(whole, mesh).parameters()
        size = sum(p.numel() * (trained if p.requires_grad else frozen) for p in parameters)
    kept, every = config.checkpoint.keep_last, config.checkpoint.keep_every_steps
    permanent = config.train.steps // every if every else 0
    return (
        f"{size / GIB:.3g} GiB on disk; the newest {kept} and {permanent} permanent ones: "
        f"{(kept + permanent) * size / GIB:.3g} GiB"
    )


def _problem(
    config: Config, plan: RankPlan, rank: int, needed: float, limit: float, device: str
) -> str:
    largest = max(plan.memory, key=lambda kind: plan.memory[kind])
    return (
        f"rank {rank} needs {needed:.3g} GiB at the fullest moment of a step, which must be at "
        f"most the {limit:.3g} GiB that a device ({device}) has for it; the largest part is "
        f"{largest} ({plan.memory[largest] / GIB:.3g} GiB): change "
        f"{' or '.join(_remedies(config, largest))}"
    )


def _remedies(config: Config, kind: str) -> Sequence[str]:
    zero, kept = config.zero, config.train.activation_checkpointing
    if kind == "activations":
        current = config.train.micro_batch_size
        smaller = f"train.micro_batch_size ({current or 'all at once'})"
        checkpointing = [] if kept == "full" else [f"train.activation_checkpointing ({kept})"]
        return [smaller, *checkpointing, "parallel.tp", "the number of devices"]
    if kind == "buckets":
        return [f"zero.deepspeed_config ({zero.deepspeed_config}): reduce_bucket_size"]
    stages = {"optimizer": 1, "gradients": 2, "weights": 3}
    ways = [f"zero.stage ({zero.stage})"] if zero.stage < stages[kind] else []
    if kind == "optimizer":
        ways.append(f"zero.offload_optimizer ({zero.offload_optimizer})")
    return [*ways, "parallel.tp", "parallel.pp", "the number of devices"]

"""DeepSpeed's configuration dictionary, generated from the training config.

Batch, precision, clipping and ZeRO are set in the training config only; settings that only
DeepSpeed has come from the JSON file of ``zero.deepspeed_config``.
"""

import json
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from ds_linclip.config import Config, check_batch
from ds_linclip.parallel.mesh import Mesh

__all__ = ["check_machine", "deepspeed_config", "open_monitor"]

#: Keys of the file that are passed to DeepSpeed's engine.
_FILE_MAY_SET = {
    "zero_optimization",
    "prescale_gradients",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
}
#: Keys of the file that configure our own monitor. They are not passed to the engine, which would
#: write curves of its own.
_MONITORS = {"comet", "csv_monitor"}

#: Default sizes of communication buckets, in elements. DeepSpeed's own default of 5e8 is more than
#: a whole CLIP model and allocated whether filled or not; the token embedding fits into ours.
_BUCKETS = {"reduce_bucket_size": 30_000_000, "allgather_bucket_size": 30_000_000}

#: Defaults for ZeRO-3. With DeepSpeed's own every layer prefetches a third of a CLIP model, up to a
#: billion parameters, and keeps what is needed again: the whole model would be on every rank.
_STAGE_3 = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 10_000_000,
    "stage3_max_live_parameters": 30_000_000,
}

#: The loss scale of fp16: doubled after a thousand finite steps; the second overflow within them
#: halves it.
_LOSS_SCALE = {
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


def check_machine(config: Config) -> None:
    """Check that DeepSpeed supports the precision and the offloading of the config here.

    Raises:
        ValueError: when it does not.
    """
    precision, accelerator = config.train.precision, get_accelerator()
    supported = {
        "fp16": accelerator.is_fp16_supported(),
        "bf16": accelerator.is_bf16_supported(),
        "amp_bf16": accelerator.is_bf16_supported(),
        "fp32": True,
    }
    if not supported[precision]:
        instead = "bf16" if precision == "fp16" and supported["bf16"] else "fp32"
        raise ValueError(
            f"train.precision ({precision}) is not supported by DeepSpeed on this device "
            f"({accelerator.device_name()}): take train.precision={instead}"
        )
    for name in ("offload_optimizer", "offload_param"):
        if getattr(config.zero, name) == "nvme" and not AsyncIOBuilder().is_compatible():
            raise ValueError(
                f"zero.{name} (nvme) needs DeepSpeed's async_io, which cannot be built here: "
                f"install libaio with its headers (libaio-dev), or take zero.{name}=cpu"
            )


def deepspeed_config(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the ``config`` argument of ``deepspeed.initialize``.

    Raises:
        ValueError: when the batch does not divide over the ranks, when the file of
            ``zero.deepspeed_config`` cannot be read, or when it sets a key that our config owns or
            that DeepSpeed does not know.
    """
    check_batch(config, mesh.dp.size)
    local = config.train.global_batch_size // mesh.dp.size
    num_micro_batches = config.num_micro_batches(mesh.dp.size)
    is_accumulated = num_micro_batches > 1
    generated: dict[str, Any] = {
        # To DeepSpeed context-parallel ranks are data-parallel: same batch, different gradients.
        "train_batch_size": local * mesh.replicas.size,
        "train_micro_batch_size_per_gpu": local // num_micro_batches,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": config.train.precision == "fp16", **_LOSS_SCALE},
        "zero_optimization": _zero(config, mesh),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Gradients of several micro-batches are summed in fp32.
        "data_types": {"grad_accum_dtype": "fp32" if is_accumulated else None},
        "communication_data_type": config.train.reduce_dtype,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
        "steps_per_print": 2**31,
    }
    content = _read(config)
    zero = content.get("zero_optimization", {})
    merged = {k: v for k, v in content.items() if k not in _MONITORS} | generated
    defaults = _BUCKETS | (_STAGE_3 if config.zero.stage == 3 else {})
    merged["zero_optimization"] = {**defaults, **zero, **generated["zero_optimization"]}
    try:
        DeepSpeedZeroConfig(**merged["zero_optimization"])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"zero.deepspeed_config ({config.zero.deepspeed_config}): zero_optimization: {problems}"
        ) from error
    return merged


def open_monitor(config: Config) -> MonitorMaster:
    """Open DeepSpeed's monitor: TensorBoard as ``log`` says, others as the file does.

    Raises:
        ValueError: when the file cannot be read or sets a key it must not set, or when a folder
            cannot be written.
    """
    board = {
        "enabled": config.log.tensorboard,
        "output_path": str(config.run_dir),
        "job_name": "tensorboard",
    }
    monitors = {k: v for k, v in _read(config).items() if k in _MONITORS} | {"tensorboard": board}
    try:
        return MonitorMaster(get_monitor_config(monitors))
    except OSError as error:
        raise ValueError(
            f"log.tensorboard, or a monitor of zero.deepspeed_config, cannot write: {error}"
        ) from error


def _zero(config: Config, mesh: Mesh) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero.stage}
    for name in ("offload_optimizer", "offload_param"):
        if (target := getattr(config.zero, name)) != "none":
            zero[name] = {"device": target, "pin_memory": mesh.device.type == "cuda"}
            if target == "nvme":
                zero[name]["nvme_path"] = config.zero.nvme_path
    return zero


def _read(config: Config) -> dict[str, Any]:
    if config.zero.deepspeed_config is None:
        return {}
    path = Path(config.zero.deepspeed_config)
    where = f"zero.deepspeed_config ({path})"
    try:
        content = json.loads(path.read_bytes())  # in any UTF, with or without a mark
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold keys and values, not {content!r}")
    may_set = _FILE_MAY_SET | _MONITORS
    for key in content.keys() - may_set:
        raise ValueError(f"{where} must not set {key}: only {', '.join(sorted(may_set))} are read")
    zero = content.get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise ValueError(
            f"{where}: zero_optimization.round_robin_gradients (true) must be false: DeepSpeed "
            "then loses track of which optimizer state belongs to which parameter"
        )
    for key in {"stage", "offload_optimizer", "offload_param"} & zero.keys():
        raise ValueError(
            f"{where} must not set zero_optimization.{key}: set zero.{key} in the training config"
        )
    return content

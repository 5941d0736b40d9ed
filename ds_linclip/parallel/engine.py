"""The DeepSpeed engine: one function that builds it, one dictionary generated from our config."""

import json
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn, optim

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh

#: What is DeepSpeed's alone. Batch, precision, clipping and optimizer are set in our config.
_FILE_MAY_SET = {
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "wandb",
    "comet",
    "csv_monitor",
}

__all__ = ["deepspeed_config", "initialize_engine"]


def initialize_engine(
    model: nn.Module,
    optimizer: optim.Optimizer,
    config: Config,
    mesh: Mesh,
    *,
    load_universal: bool = False,
) -> Any:
    """Hand model and optimizer to ``deepspeed.initialize``; returns the ``DeepSpeedEngine``.

    Args:
        model, optimizer, config, mesh: Of the run.
        load_universal: The engine will load a checkpoint in DeepSpeed's universal form.

    Raises:
        ValueError: as :func:`deepspeed_config`.
    """
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, mesh.dp_size)
        | {"checkpoint": {"load_universal": load_universal}},
        mpu=mesh.mpu(),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(config: Config, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary: batch, precision and clipping from our config, the rest from the
    JSON file of ``zero.deepspeed_config``.

    Raises:
        ValueError: when that file cannot be read, or sets a key that our config owns or that
            DeepSpeed does not know.
    """
    generated: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // dp_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": config.zero.stage},
        "steps_per_print": 2**31,
        "tensorboard": {
            "enabled": config.log.tensorboard,
            "output_path": str(config.run_dir),
            "job_name": "tensorboard",
        },
    }
    if config.zero.deepspeed_config is None:
        return generated
    path = Path(config.zero.deepspeed_config)
    try:
        merged = _merge(json.loads(path.read_text()), generated)
        DeepSpeedZeroConfig(**merged["zero_optimization"])
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"zero.deepspeed_config ({path}) cannot be read: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"zero.deepspeed_config ({path}): zero_optimization: {problems}"
        ) from error
    except ValueError as error:
        raise ValueError(f"zero.deepspeed_config ({path}) {error}") from error
    return merged


def _merge(extra: Any, generated: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(extra, dict):
        raise ValueError(f"must hold keys and values, not {extra!r}")
    for key in extra.keys() - _FILE_MAY_SET:
        owned = "the training config owns it" if key in generated else "it is not known here"
        raise ValueError(f"must not set {key}: {owned}")
    zero = extra.get("zero_optimization", {})
    if "stage" in zero:
        raise ValueError("must not set zero_optimization.stage: the training config owns it")
    return {**extra, **generated, "zero_optimization": {**zero, **generated["zero_optimization"]}}

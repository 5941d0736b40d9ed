"""The DeepSpeed engine: one function that builds it, one dictionary generated from our config."""

import json
from pathlib import Path
from typing import Any

from torch import nn, optim

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh

__all__ = ["deepspeed_config", "initialize_engine"]


def initialize_engine(
    model: nn.Module, optimizer: optim.Optimizer, config: Config, mesh: Mesh
) -> Any:
    """Hand model and optimizer to ``deepspeed.initialize``; returns the ``DeepSpeedEngine``.

    Raises:
        ValueError: as :func:`deepspeed_config`.
    """
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, mesh.dp_size),
        mpu=mesh.mpu(),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(config: Config, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary: batch, precision and clipping from our config, the rest from the
    JSON file of ``zero.deepspeed_config``.

    Raises:
        ValueError: when that file cannot be read or sets a key that our config owns.
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
        extra = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"zero.deepspeed_config ({path}) cannot be read: {error}") from error
    return _merge(extra, generated, path)


def _merge(extra: dict[str, Any], generated: dict[str, Any], path: Path) -> dict[str, Any]:
    merged = dict(extra)
    for key, value in generated.items():
        if key not in extra:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(extra[key], dict):
            merged[key] = _merge(extra[key], value, path)
        else:
            raise ValueError(
                f"zero.deepspeed_config ({path}) must not set {key}: the training config owns it"
            )
    return merged

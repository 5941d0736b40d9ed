"""The configuration: typed dataclasses, loaded in three merges, checked once.

Structured defaults <- YAML file (and the files its ``base:`` key names) <- ``key=value`` from the
command line. Only the typed :class:`Config` travels further; nothing else reads YAML.
"""

from ds_linclip.config.loading import as_image_size, config_as_yaml, load_config, save_config
from ds_linclip.config.schema import (
    Attention,
    CacheConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HealthConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    NetworkConfig,
    OptimConfig,
    ParallelConfig,
    Resolution,
    Source,
    TextTower,
    TrainConfig,
    VisionTower,
    WatchdogConfig,
    ZeroConfig,
)
from ds_linclip.config.validation import check_batch, check_model, check_ranks, validate

__all__ = [
    "Attention",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "HealthConfig",
    "InitConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "ParallelConfig",
    "Resolution",
    "Source",
    "TextTower",
    "TrainConfig",
    "VisionTower",
    "WatchdogConfig",
    "ZeroConfig",
    "as_image_size",
    "check_batch",
    "check_model",
    "check_ranks",
    "config_as_yaml",
    "load_config",
    "save_config",
    "validate",
]

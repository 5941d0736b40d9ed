"""The configuration: typed dataclasses, merged from three sources and checked once.

Later sources override earlier ones: defaults, a YAML file (after the files that ``base:`` names),
``key=value`` arguments. Only the typed :class:`Config` is passed on; no other module reads YAML.
"""

from ds_linclip.config.attention import (
    ATTENTION_KINDS,
    Attention,
    AttentionSettings,
    DepthwiseLocal,
    FrequencyAttention,
    LayerAttention,
    LinearAttention,
    NoLocal,
    SoftmaxAttention,
    StateAttention,
)
from ds_linclip.config.loading import config_as_yaml, load_config, save_config
from ds_linclip.config.schema import (
    CacheConfig,
    Config,
    DataConfig,
    InitConfig,
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
from ds_linclip.config.validation import check_batch, check_model, check_ranks
from ds_linclip.config.values import as_image_size, build_section

__all__ = [
    "ATTENTION_KINDS",
    "Attention",
    "AttentionSettings",
    "CacheConfig",
    "Config",
    "DataConfig",
    "DepthwiseLocal",
    "FrequencyAttention",
    "InitConfig",
    "LayerAttention",
    "LinearAttention",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "NoLocal",
    "OptimConfig",
    "ParallelConfig",
    "Resolution",
    "SoftmaxAttention",
    "Source",
    "StateAttention",
    "TextTower",
    "TrainConfig",
    "VisionTower",
    "WatchdogConfig",
    "ZeroConfig",
    "as_image_size",
    "build_section",
    "check_batch",
    "check_model",
    "check_ranks",
    "config_as_yaml",
    "load_config",
    "save_config",
]

"""CLIP with linear attention: DeepSpeed engine, Megatron-core layers, exact data streaming."""

__version__ = "0.1.0"

"""CLIP with linear attention: DeepSpeed engine, Megatron-core layers, exact data streaming."""

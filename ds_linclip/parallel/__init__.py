"""Process groups, layers and the engine: the only importers of deepspeed and megatron.core."""

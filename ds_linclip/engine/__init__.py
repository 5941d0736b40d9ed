"""DeepSpeed engines: optimizer steps with or without a pipeline, ZeRO state, weight averages."""

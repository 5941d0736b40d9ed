"""DeepSpeed engines: optimizer steps with and without a pipeline, ZeRO state, averages."""

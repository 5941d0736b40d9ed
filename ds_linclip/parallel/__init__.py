"""Process groups and tensor- and context-parallel layers, over megatron.core and DeepSpeed."""

import warnings

with warnings.catch_warnings():
    # Each of megatron's modules warns about the optional NVIDIA libraries that are not installed.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core.tensor_parallel  # noqa: F401

"""Process groups, layers and the engine: the only importers of deepspeed and megatron.core."""

import warnings

with warnings.catch_warnings():
    # megatron reports, module by module, which of NVIDIA's optional libraries it does without.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core.tensor_parallel  # noqa: F401

"""The Triton kernels compiled ahead of time to cubins, as they are launched; no GPU is needed."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from linclip_kernels.linear_attention import causal, noncausal
from linclip_kernels.linear_attention.eager import Form
from linclip_kernels.linear_attention.tiles import Launch, split_tokens

#: Shared memory one block can have, in bytes, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def launches(
    form: Form,
    *,
    num_tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    key_dim: int = 64,
    value_dim: int = 64,
) -> list[Launch]:
    """All launches of a forward and a backward on packed views; 2048 tokens are two parts."""
    qkv = torch.empty(1, num_tokens, 2, 2 * key_dim + value_dim, dtype=dtype)
    q, k, v = qkv.split([key_dim, key_dim, value_dim], dim=-1)
    plans = causal if form.causal else noncausal
    out, state, forward = plans.plan_forward(q, k, v, form)
    *_, backward = plans.plan_backward(q, k, v, out, state, form)
    return forward + backward


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile with the very signature and specialisation that the launch would have."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    arguments = launch.arguments | options
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**arguments)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, arguments, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes per thread that did not fit into registers."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run(
        [tool, "-res-usage", str(file)], capture_output=True, text=True, check=True
    )
    match = re.search(r"REG:\d+ STACK:(\d+)", usage.stdout)
    assert match, usage.stdout
    return int(match.group(1))


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("normalized", [False, True], ids=["eq7", "eq4"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "long-alpha"])
def test_bfloat16_kernels_compile(
    is_causal: bool, normalized: bool, training: bool, capability: int, tmp_path: Path
) -> None:
    form = Form(is_causal, normalized, True, 0.5, 0.0 if training else 0.5)
    num_tokens = (77 if is_causal else 197) if training else 2048
    for launch in launches(form, num_tokens=num_tokens):
        assert not training or launch.arguments["num_parts"] == 1
        compiled = compile_launch(launch, capability)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]
        if capability >= 90:
            assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0, compiled.metadata.name


@pytest.mark.parametrize(
    ("capability", "dtype", "key_dim", "value_dim"),
    [
        (80, torch.float32, 60, 80),
        (90, torch.float16, 64, 64),
        (100, torch.bfloat16, 256, 256),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_other_widths_and_dtypes_compile(
    capability: int, dtype: torch.dtype, key_dim: int, value_dim: int, is_causal: bool
) -> None:
    form = Form(is_causal, True, True, 0.5, 0.5)
    for launch in launches(form, dtype=dtype, key_dim=key_dim, value_dim=value_dim):
        compiled = compile_launch(launch, capability)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("num_tokens", [1, 1025, 3004, 4097, 100_001])
def test_parts_are_whole_blocks(num_tokens: int, is_causal: bool, dtype: torch.dtype) -> None:
    """A block that reached into the next part would be counted twice."""
    form = Form(is_causal, True, True, 0.5, 0.0)
    for heads, dim in ((1, 16), (250, 64), (1000, 256)):
        q = torch.empty(1, num_tokens, heads, dim, dtype=dtype, device="meta")
        split = split_tokens(q, q, form)
        assert split.part % split.block_tokens == 0
        assert split.part <= 4096
        assert (split.num_parts - 1) * split.part < num_tokens <= split.num_parts * split.part

"""The chip's resources that every kernel uses, read from cubins compiled here without a GPU.

python -m linclip_kernels.linear_attention.compiled.resources
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Chip,
    Launch,
    RowFactor,
    max_value_block,
    partition_tokens,
)
from linclip_kernels.linear_attention.variant import Variant

__all__ = [
    "FORMULAS",
    "MULTIPROCESSORS",
    "Case",
    "Usage",
    "cases",
    "compilation_key",
    "compile_case_kernel",
    "compile_launch",
    "equation",
    "kernel_name",
    "measure",
    "run_on_cubin",
    "training_cases",
]


class Multiprocessor(NamedTuple):
    """What a multiprocessor holds, beside its 65,536 registers."""

    shared_memory: int  # bytes; a block can have all but 1 KB
    warps: int
    blocks: int


REGISTERS_PER_SM = 65536
#: By compute capability: data-centre chips, and those of consumers with less memory.
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    89: Multiprocessor(100 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 64, 32),
    100: Multiprocessor(228 * 1024, 64, 32),
    120: Multiprocessor(100 * 1024, 48, 24),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


#: The formulas that training computes: Eq. 7, Eq. 4 and the centred scores of InLine.
FORMULAS = (
    Variant(),
    Variant(normalized=True),
    Variant(qk_norm=False, score_scale=1.0, length_exponent=1.0, qk_scale=64**-0.5, centered=True),
)


def equation(variant: Variant) -> str:
    """Return the short name of a formula."""
    if variant.centered:
        return "centred"
    return "Eq. 4" if variant.normalized else "Eq. 7"


@dataclass(frozen=True)
class Case:
    """A forward and a backward as they are launched for one kind of input."""

    variant: Variant
    num_tokens: int
    dtype: str = "bf16"
    dim: int = 64
    heads: int = 2  # few, so that long sequences have several parts

    def __str__(self) -> str:
        order = "causal" if self.variant.causal else "bidirectional"
        name = f"{order} {equation(self.variant)} {self.dtype} D={self.dim}"
        name += f" N={self.num_tokens} H={self.heads}"
        return (
            name if self.variant.feature_map == "affine" else f"{name} {self.variant.feature_map}"
        )

    def launches(self, arch: int | str) -> list[Launch]:
        """Return the launches of a forward and a backward on views of a packed [B, N, H, 3, D]."""
        forward, backward = self.directions(Chip(arch=arch))
        return forward + backward

    def directions(self, chip: Chip) -> tuple[list[Launch], list[Launch]]:
        """Return the launches of a forward, and those of a backward."""
        shape = 1, self.num_tokens, self.heads, 3, self.dim
        q, k, v = torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").unbind(3)
        v = v[..., : max_value_block(q, chip)]
        plans, variant = causal if self.variant.causal else bidirectional, self.variant
        out, gradients = torch.empty_like(v), tuple(map(torch.empty_like, (q, k, v)))
        partition = partition_tokens(q, v.shape[-1], variant, chip=chip)
        factor = RowFactor(float(variant.score_scale), float(variant.qk_scale), None)
        call = Call(q, k, v, None, partition, factor)
        keeps_state = not variant.causal and self.num_tokens >= 8 * self.dim
        state = partition.empty_states(1) if keeps_state else None
        forward = plans.plan_forward(call, out, state)
        _, backward = plans.plan_backward(call, state, out, None, gradients)
        return forward, backward


@dataclass(frozen=True)
class Usage:
    """The resources that one compiled kernel uses."""

    case: Case
    kernel: str
    capability: int
    registers: int  # per thread
    stack: int  # bytes per thread that did not fit into registers
    shared: int  # bytes per block
    num_warps: int

    @property
    def blocks_per_sm(self) -> int:
        """The number of programs that fit on a multiprocessor."""
        registers = self.num_warps * 256 * -(-32 * self.registers // 256)
        chip = MULTIPROCESSORS[self.capability]
        return min(
            chip.blocks,
            chip.warps // self.num_warps,
            REGISTERS_PER_SM // registers,
            chip.shared_memory // (self.shared + 1024),
        )

    @property
    def occupancy(self) -> float:
        """Resident warps over the warps a multiprocessor can hold."""
        return self.blocks_per_sm * self.num_warps / MULTIPROCESSORS[self.capability].warps


def training_cases() -> Iterator[Case]:
    """Yield what training launches: all formulas, both orders, short and long, heads of 64 and 128.

    With 2 heads a long sequence has several parts; with 1024 it is one, whose state is kept.
    """
    for dim, is_causal, formula in product((64, 128), (False, True), FORMULAS):
        variant = formula._replace(causal=is_causal)
        for num_tokens in (77 if is_causal else 197, 4096):
            yield Case(variant, num_tokens, dim=dim)
        if not is_causal:
            yield Case(variant, 577, dim=dim, heads=1024)


def cases() -> Iterator[Case]:
    """Yield what training uses, short and long, then other widths, dtypes and feature maps."""
    for is_causal, formula in product((False, True), FORMULAS):
        variant = formula._replace(causal=is_causal)
        for num_tokens in (77 if is_causal else 197, 4096):
            yield Case(variant, num_tokens)
        if not is_causal:  # one part, and a state that is kept for the backward
            yield Case(variant, 577, heads=1024)
    for is_causal, (dtype, dim) in product(
        (False, True),
        [
            ("fp32", 64),
            ("fp16", 64),
            ("bf16", 32),
            ("bf16", 80),
            ("bf16", 128),
            ("bf16", 256),
            ("fp32", 256),
        ],
    ):
        yield Case(Variant(causal=is_causal, normalized=True), 4096, dtype, dim)
    for is_causal, feature_map in product((False, True), ("relu", "softplus")):
        variant = Variant(causal=is_causal, normalized=True, feature_map=feature_map)
        yield Case(variant, 4096)
    yield Case(Variant(causal=True, length_exponent=0.5), 4096)


def measure(case: Case, capability: int) -> list[Usage]:
    """Compile the kernels of a case and read their cubins.

    Args:
        case: The inputs.
        capability: The compute capability, a key of ``MULTIPROCESSORS``.

    Returns:
        One Usage per kernel.

    Raises:
        RuntimeError: cuobjdump does not report the usage of a kernel.
    """
    launches = case.launches(capability)
    usages = [compile_case_kernel(case, launch, capability)[0] for launch in launches]
    return list({usage.kernel: usage for usage in usages}.values())


def compile_case_kernel(case: Case, launch: Launch, capability: int) -> tuple[Usage, Any]:
    """Compile one launch of a case, and return what it uses beside what Triton compiled."""
    compiled = compile_launch(launch, capability)
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    text = run_on_cubin(cuobjdump, "-res-usage", compiled.asm["cubin"])
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump reports no registers: {text!r}")
    usage = Usage(
        case=case,
        kernel=kernel_name(launch),
        capability=capability,
        registers=int(match[1]),
        stack=int(match[2]),
        shared=compiled.metadata.shared,
        num_warps=launch.num_warps,
    )
    return usage, compiled


@cache
def run_on_cubin(program: str, option: str, cubin: bytes) -> str:
    """Return what one of NVIDIA's tools prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [program, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_name(launch: Launch) -> str:
    """Return the kernel's name, and which side of it the launch computes."""
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    arguments = launch.arguments
    if name == "backward" and arguments["dk"] is None:
        return "backward, queries"
    if name == "backward" and arguments["dq"] is None:
        return "backward, keys"
    return name


def compile_launch(launch: Launch, arch: int | str) -> Any:
    """Compile with exactly the signature and specialisation that the launch would have on a chip.

    Args:
        launch: The launch, planned for that chip.
        arch: :attr:`Chip.arch`.
    """
    source, options = _source(launch, arch)
    return triton.compile(source, target=_target(arch), options=options)


def compilation_key(launch: Launch, arch: int | str) -> str:
    """Return what is the same for two launches exactly if they need one compilation."""
    source, options = _source(launch, arch)
    return f"{source.hash()} {sorted(options.items())}"


def _source(launch: Launch, arch: int | str) -> tuple[ASTSource, dict[str, Any]]:
    backend = make_backend(_target(arch))
    kernel = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    arguments = launch.arguments | options
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**arguments)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, arguments, bound, specialization, None
    )
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__


def _target(arch: int | str) -> GPUTarget:
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--capabilities",
        type=int,
        nargs="+",
        choices=MULTIPROCESSORS,
        default=list(MULTIPROCESSORS),
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.match in str(case)]
    if not chosen:
        parser.error(f"match ({options.match!r}) must be part of the name of a case")
    columns = "{:52}{:22}{:>6}{:>6}{:>7}{:>8}{:>7}{:>11}"
    names = "kernel", "cc", "regs", "stack", "shared", "warps", "occupancy"
    print(columns.format("", *names))
    with ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(measure, case, capability)
            for case in chosen
            for capability in options.capabilities
        ]
        for use in (use for job in jobs for use in job.result()):
            capability, occupancy = use.capability / 10, f"{use.occupancy:.0%}"
            numbers = use.registers, use.stack, use.shared, use.num_warps
            line = columns.format(str(use.case), use.kernel, capability, *numbers, occupancy)
            print(line, flush=True)


if __name__ == "__main__":
    main()

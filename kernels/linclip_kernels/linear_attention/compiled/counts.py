"""The work of every loop of the kernels, counted in machine code compiled here without a GPU.

python -m linclip_kernels.linear_attention.compiled.counts --capabilities 90 --match "Eq. 4"
"""

import argparse
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import triton

from linclip_kernels.linear_attention.compiled.resources import (
    MULTIPROCESSORS,
    Case,
    Usage,
    cases,
    compile_case_kernel,
    run_on_cubin,
    training_cases,
)
from linclip_kernels.linear_attention.compiled.sass import Loop, find_loops
from linclip_kernels.linear_attention.compiled.ttgir import (
    LoopPlan,
    copy_sizes,
    loop_plans,
)
from linclip_kernels.linear_attention.triton_backend.partition import Launch

__all__ = ["KernelCounts", "LoopCounts", "count_kernel", "count_loop", "print_table"]

#: Groups of instructions by the beginning of their opcodes; an instruction counts in the first.
GROUPS = {
    "hgmma": r"[HQI]GMMA",
    "tcgen05": r"UTC\w*MMA",
    "hmma": r"[HIQD]MMA",
    "mufu": r"(MUFU|F2I|I2F)(\.|$)",
    "shfl": r"SHFL|C?REDUX",
    "bar": r"BAR\.",
    "depbar": r"(LDG)?DEPBAR|WARPGROUP\.DEPBAR|SYNCS\.PHASECHK",
    "ldgsts": r"LDGSTS",
    "ldg": r"LDG?(\.|$)",
    "stg": r"STG|ST\.|REDG|ATOM",
    "tma": r"UTMALDG|UTMASTG|UBLKCP",
    "ldsm": r"LDSM",
    "lds": r"LDS",
    "sts": r"STS",
    "tmem": r"LDTM|STTM",
    "spill": r"LDL|STL",
    "fp32": r"F(ADD|MUL|FMA)|H(FMA|ADD|MUL)2",
    "imad": r"IMAD",
    "int": r"FSEL|F(MNMX|SETP)|HMNMX2|HSETP2|F2FP|IADD|ISETP|LOP3|SHF|PRMT|SEL|LEA|V?IMNMX|VIADD"
    r"|IABS|I2FP|SGXT|PLOP3|P2R|R2P|MOV|CS2R|VOTE",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in GROUPS.items()}
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")
#: Matrices of 8 x 8 16-bit numbers that one instruction moves, 128 bytes each.
_MATRICES = re.compile(r"(?:LDSM|STSM)\..*88(?:\.(\d))?")
_SHAPE = re.compile(r"\.(?:(\d+)x(\d+)x(\d+)|16(8)(\d+))\.")
#: Rows, columns and depth of a product on tcgen05, which the machine code does not show: assumed.
TCGEN05_SHAPE = 128, 64, 16


class LoopCounts(NamedTuple):
    """What one warp executes in one iteration of a loop, inner loops apart.

    Attributes:
        loop: Its place: "once" for the code outside loops, "2" for the second loop, "2.1" for the
            first one inside that.
        instructions: All of them.
        groups: How many there are of each group of ``GROUPS``.
        named_barriers: Barriers of a part of the warps.
        accesses: Global loads and stores by their width in bits.
        bytes: Moved by all warps of a program from and to global memory, masked rows included.
        shared_clocks: Cycles of the port of shared memory for one warp, without bank conflicts.
        products: Multiply-adds of all warps of a program on each kind of matrix unit.
        plan: What the machine code does not show.
    """

    loop: str
    instructions: int
    groups: Counter[str]
    named_barriers: int
    accesses: Counter[int]
    bytes: int
    shared_clocks: int
    products: Counter[str]
    plan: LoopPlan = LoopPlan()

    @property
    def kinds(self) -> str:
        """The kinds of matrix instructions."""
        return "+".join(self.products)

    def per_kilobyte(self, number: int) -> float | None:
        return number / (self.bytes / 1024) if self.bytes else None


@dataclass(frozen=True)
class KernelCounts:
    """One kernel as training launches it: its resources and what its loops do."""

    usage: Usage
    loops: Sequence[LoopCounts]

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield the table's rows, one per loop."""
        use = self.usage
        for loop in self.loops:
            yield {
                "case": str(use.case),
                "kernel": use.kernel,
                "cc": use.capability / 10,
                "regs": use.registers,
                "stack": use.stack,
                "shared": use.shared,
                "warps": use.num_warps,
                "ctas": use.blocks_per_sm,
                "loop": loop.loop,
                "instr": loop.instructions,
                **{name: loop.groups[name] or None for name in GROUPS},
                "named_bar": loop.named_barriers or None,
                "access": " ".join(f"{n}x{bits}" for bits, n in sorted(loop.accesses.items())),
                "mma": loop.kinds,
                "buffers": loop.plan.buffers,
                "step": loop.plan.step,
                "kb": round(loop.bytes / 1024, 2),
                "instr_per_kb": _rounded(loop.per_kilobyte(loop.instructions)),
                "bar_per_kb": _rounded(loop.per_kilobyte(loop.groups["bar"])),
                "shfl_per_kb": _rounded(loop.per_kilobyte(loop.groups["shfl"])),
            }


def count_kernel(case: Case, launch: Launch, capability: int) -> KernelCounts:
    """Compile one launch and count what its loops do.

    Args:
        case: What is launched.
        launch: One of the launches of the case.
        capability: The compute capability, a key of ``MULTIPROCESSORS``.
    """
    usage, compiled = compile_case_kernel(case, launch, capability)
    loops = _count_loops(compiled.asm["cubin"], compiled.asm["ttgir"], launch.num_warps)
    return KernelCounts(usage, loops)


@cache
def _count_loops(cubin: bytes, ttgir: str, num_warps: int) -> list[LoopCounts]:
    found = find_loops(run_on_cubin(triton.knobs.nvidia.nvdisasm.path, "-c", cubin))
    num_copies = sum(one.opcode.startswith("UTMA") for loop in found for one in loop.instructions)
    copy_bytes = sum(copy_sizes(ttgir)) // max(1, num_copies)
    plans = [LoopPlan(), *loop_plans(ttgir, len(found) - 1)]
    return [
        count_loop(loop, place, num_warps, copy_bytes)._replace(plan=plan)
        for loop, place, plan in zip(found, _places(found), plans, strict=True)
    ]


def count_loop(loop: Loop, place: str, num_warps: int, copy_bytes: int = 0) -> LoopCounts:
    """Count the instructions of one loop.

    Args:
        loop: The loop.
        place: :attr:`LoopCounts.loop`.
        num_warps: Warps of a program.
        copy_bytes: What one copy of the tensor memory accelerator moves.
    """
    groups: Counter[str] = Counter()
    accesses: Counter[int] = Counter()
    products: Counter[str] = Counter()
    named = num_bytes = shared = 0
    for one in loop.instructions:
        group = next((name for name, found in _PATTERNS.items() if found.match(one.opcode)), "")
        groups[group] += group != ""
        width = _WIDTH.search(one.opcode)
        bits = int(width[1]) if width else 32
        if group in ("ldg", "ldgsts", "stg"):
            accesses[bits] += 1
            num_bytes += bits // 8 * 32 * num_warps
        if matrices := _MATRICES.match(one.opcode):
            shared += int(matrices[1] or 1)
        elif group in ("lds", "sts", "ldgsts"):
            shared += max(1, bits // 32)
        shared += group == "shfl"
        num_bytes += copy_bytes * (group == "tma")
        named += group == "bar" and not re.search(r"\b0x0\b", one.operands.split(",")[0])
        if group in ("hmma", "hgmma", "tcgen05"):
            products[group] += _multiply_adds(one.opcode, group, num_warps)
    return LoopCounts(
        loop=place,
        instructions=len(loop.instructions),
        groups=groups,
        named_barriers=named,
        accesses=accesses,
        bytes=num_bytes,
        shared_clocks=shared,
        products=products,
    )


def _multiply_adds(opcode: str, group: str, num_warps: int) -> int:
    """Return the multiply-adds of all warps of a program: 4 warps share one HGMMA."""
    if group == "tcgen05":
        return prod(TCGEN05_SHAPE)
    shape = _SHAPE.search(opcode)
    if shape is None:
        raise ValueError(f"opcode ({opcode!r}) must show the shape of a matrix product")
    if group == "hgmma":
        return prod(map(int, shape.groups()[:3])) * num_warps // 4
    return 16 * int(shape[4]) * int(shape[5]) * num_warps


def _places(loops: Sequence[Loop]) -> list[str]:
    numbers: list[int] = []
    places = []
    for loop in loops[1:]:
        numbers = numbers[: loop.depth]
        numbers += [0] * (loop.depth - len(numbers))
        numbers[-1] += 1
        places.append(".".join(map(str, numbers)))
    return ["once", *places]


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 2)


def _count_case(case: Case, capability: int) -> list[KernelCounts]:
    found = {}
    for launch in case.launches(capability):
        counts = count_kernel(case, launch, capability)
        found[counts.usage.kernel] = counts
    return list(found.values())


def print_table(kernels: Sequence[KernelCounts]) -> None:
    """Print one line per kernel and one per loop, counts that are zero left out."""
    for counts in kernels:
        use = counts.usage
        print(
            f"{use.case}: {use.kernel}, cc {use.capability / 10}: {use.registers} registers, "
            f"{use.stack} B stack, {use.shared} B shared, {use.num_warps} warps, "
            f"{use.blocks_per_sm} CTAs/SM"
        )
        for row, loop in zip(counts.rows(), counts.loops, strict=True):
            groups = " ".join(f"{name} {n}" for name in GROUPS if (n := loop.groups[name]))
            access = f" access {row['access']}" if row["access"] else ""
            buffers = "" if loop.plan.buffers is None else f" buffers {loop.plan.buffers}"
            named = f" named barriers {loop.named_barriers}" if loop.named_barriers else ""
            rates = f"{row['instr_per_kb']} instr/KB" if loop.bytes else "no traffic"
            print(
                f"    loop {loop.loop:5} {loop.instructions:5} instr  {row['kb']} KB  {rates}  "
                f"{groups}{access}{named}{buffers}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--capabilities", type=int, nargs="+", choices=MULTIPROCESSORS, default=[80, 90, 100]
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="not only what training launches")
    parser.add_argument("--csv", type=Path, help="write the table into this file too")
    options = parser.parse_args()
    chosen = [
        case for case in (cases if options.all else training_cases)() if options.match in str(case)
    ]
    if not chosen:
        parser.error(f"match ({options.match!r}) must be part of the name of a case")
    jobs = [(case, capability) for capability in options.capabilities for case in chosen]
    with ProcessPoolExecutor(min(4, len(jobs))) as pool:
        kernels = []
        for found in pool.map(_count_case, *zip(*jobs, strict=True)):
            print_table(found)
            kernels += found
    rows = [row for counts in kernels for row in counts.rows()]
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

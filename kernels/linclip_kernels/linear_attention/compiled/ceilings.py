"""The counts of the training kernels against ceilings.csv, compiled here without a GPU.

A change that makes a count worse, or better, must write the table again in the same commit, so that
it is always true and a diff shows what the change costs.

python -m linclip_kernels.linear_attention.compiled.ceilings [--write]
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from math import prod
from pathlib import Path

import triton

from linclip_kernels.linear_attention.compiled.counts import LoopCounts, count_kernel
from linclip_kernels.linear_attention.compiled.resources import (
    FORMULAS,
    Case,
    compilation_key,
    compile_case_kernel,
    equation,
    kernel_name,
    training_cases,
)
from linclip_kernels.linear_attention.triton_backend.partition import Chip

__all__ = ["TABLE", "compare", "count_case", "read_table"]

TABLE = Path(__file__).with_name("ceilings.csv")
#: What a row is about: a loop, the "grid", or with neither the whole kernel.
KEYS = ("case", "kernel", "cc", "loop")
#: Counts that are worse when they are higher, and those that are worse when they are lower.
CEILINGS = (
    *("registers", "stack", "instructions", "instr_per_kb", "bar_per_kb", "shfl_per_kb"),
    *("narrow", "variants"),
)
FLOORS = ("ctas_per_sm", "buffers")
#: Bytes of stack, and part of the instructions, by which ptxas differs from itself in kernels that
#: spill: of the same PTX it makes one of several cubins, by where its memory lies. (12 runs of one
#: kernel: 6 cubins, 264 or 272 bytes of stack, 0.8 % more instructions; 6 runs without randomized
#: addresses: one cubin.)
STACK_VARIATION = 16
INSTRUCTION_VARIATION = 0.01
COLUMNS = (
    *KEYS,
    *("registers", "stack", "ctas_per_sm", "programs_per_sm", "variants"),
    *("instructions", "instr_per_kb", "bar_per_kb", "shfl_per_kb", "mma", "buffers", "narrow"),
)
CAPABILITIES = (80, 90, 100)
#: (B * H, N) whose grids are in the table.
GRIDS = {
    False: ((3072, 197), (1024, 577), (256, 4096), (16, 4096), (16, 16_384), (16, 2**20)),
    True: ((2048, 77), (256, 4096), (16, 2**20)),
}
#: (B * H, N) of one training run with images of several sizes.
LENGTHS = ((768, 197), (768, 257), (512, 577), (512, 1025), (192, 4096), (192, 5000))

Row = dict[str, str]


def count_case(case: Case, capability: int) -> list[Row]:
    """Compile the kernels of a case and return their rows; loops are counted on Hopper alone."""
    rows: dict[tuple[str, ...], Row] = {}
    for launch in case.launches(capability):
        usage, _ = compile_case_kernel(case, launch, capability)
        resources: dict[str, float | str | None] = {
            "registers": usage.registers,
            "stack": usage.stack,
            "ctas_per_sm": usage.blocks_per_sm,
        }
        found = [_row(case, usage.kernel, capability, "", **resources)]
        if capability == 90:
            loops = count_kernel(case, launch, capability).loops
            found += [_row(case, usage.kernel, 90, x.loop, **_counts(x)) for x in loops]
        rows |= {_key(row): row for row in found}
    return list(rows.values())


def _counts(loop: LoopCounts) -> dict[str, float | str | None]:
    """Return the counts of a loop: per KB that it moves, if it moves tiles."""
    if loop.loop == "once" or not loop.bytes:
        return {"instructions": loop.instructions}
    return {
        "instr_per_kb": loop.per_kilobyte(loop.instructions),
        "bar_per_kb": loop.per_kilobyte(loop.groups["bar"]),
        "shfl_per_kb": loop.per_kilobyte(loop.groups["shfl"]),
        "mma": loop.kinds,
        "buffers": loop.plan.buffers,
        "narrow": sum(number for bits, number in loop.accesses.items() if bits < 128),
    }


def grid_rows() -> Iterator[Row]:
    """Yield the programs of every launch per multiprocessor of an H100."""
    for causal, formula in product((False, True), FORMULAS):
        for heads, num_tokens in GRIDS[causal]:
            case = Case(formula._replace(causal=causal), num_tokens, heads=heads)
            for launch in case.launches(90):
                programs = prod(launch.grid) / Chip().num_sms
                yield _row(case, kernel_name(launch), 90, "grid", programs_per_sm=programs)


def variant_rows() -> Iterator[Row]:
    """Yield how many kernels runs compile: one size of images and texts, and several sizes."""
    for formula in FORMULAS:
        images, texts = (formula._replace(causal=causal) for causal in (False, True))
        runs = {
            "training, N = 197 and 77": [(images, 768, 197), (texts, 512, 77)],
            "training, N = 197 to 5000": [(images, heads, tokens) for heads, tokens in LENGTHS],
        }
        for name, calls in runs.items():
            keys = {
                compilation_key(launch, 90)
                for variant, heads, tokens in calls
                for launch in Case(variant, tokens, heads=heads).launches(90)
            }
            yield _row(f"{name}, {equation(formula)}", "all", 90, variants=len(keys))


def compare(found: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """Return one line for every count that differs from the table by more than ptxas varies.

    Args:
        found: What was counted.
        table: What the table says about the same, at least.
    """
    known = {_key(row): row for row in table}
    spilling = {_key(row)[:3] for row in table if row["stack"] not in ("", "0")}
    lines = []
    for row in found:
        place = f"{row['case']}: {row['kernel']}, sm_{row['cc']}"
        place += f", {row['loop']}" if row["loop"] else ""
        expected = known.get(_key(row))
        if expected is None:
            lines.append(f"new: {place}: not in the table")
            continue
        for name in COLUMNS[len(KEYS) :]:
            may_vary = _key(row)[:3] in spilling and _is_variation(name, row, expected)
            if row[name] != expected[name] and not may_vary:
                verdict = _verdict(name, row[name], expected[name])
                limit = "at least" if name in FLOORS else "at most" if name in CEILINGS else "is"
                lines.append(
                    f"{verdict}: {place}: {name} {row[name] or 'none'}, "
                    f"in the table {limit} {expected[name] or 'none'}"
                )
    return lines


def read_table(path: Path = TABLE) -> tuple[str, list[Row]]:
    """Return the version of Triton that a table is true for, and its rows."""
    first, *lines = path.read_text().splitlines()
    return first.removeprefix("# triton "), list(csv.DictReader(lines))


def _is_variation(name: str, found: Row, expected: Row) -> bool:
    """Return whether counts that differ may both be those of the same PTX."""
    if name not in ("stack", "instructions", "instr_per_kb") or not found[name]:
        return False
    limit = float(expected[name] or 0)
    allowed = STACK_VARIATION if name == "stack" else INSTRUCTION_VARIATION * limit
    return abs(float(found[name]) - limit) <= allowed


def _verdict(name: str, found: str, expected: str) -> str:
    if not found or not expected or name not in CEILINGS + FLOORS:
        return "changed"
    higher = float(found) > float(expected)
    return "worse" if higher == (name in CEILINGS) else "better"


def _row(
    case: object, kernel: str, capability: int, loop: str = "", /, **counts: float | str | None
) -> Row:
    row = dict.fromkeys(COLUMNS, "")
    row |= {"case": str(case), "kernel": kernel, "cc": str(capability), "loop": loop}
    for name, value in counts.items():
        if value is not None:
            row[name] = value if isinstance(value, str) else f"{round(value, 2):g}"
    return row


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEYS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table again")
    options = parser.parse_args()
    jobs = [(case, capability) for case in training_cases() for capability in CAPABILITIES]
    with ProcessPoolExecutor() as pool:
        rows = [row for rows in pool.map(count_case, *zip(*jobs, strict=True)) for row in rows]
    rows += [*variant_rows(), *{_key(row): row for row in grid_rows()}.values()]
    if options.write:
        with TABLE.open("w", newline="") as file:
            file.write(f"# triton {triton.__version__}\n")
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return 0
    version, table = read_table()
    if version != triton.__version__:
        print(f"error: the table is for triton {version}, installed is {triton.__version__}")
        return 1
    lines = compare(rows, table)
    found = {_key(row) for row in rows}
    lines += [f"gone: {', '.join(_key(row))}" for row in table if _key(row) not in found]
    for line in lines:
        print(line)
    if lines:
        print(f"{len(lines)} counts differ: write the table again with --write and commit it")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

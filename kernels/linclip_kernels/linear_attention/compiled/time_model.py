"""A model of a kernel's time from the counts of its machine code, the grid and the chip.

A kernel takes as long as the slowest of five limits allows:

- bandwidth: every tensor of the launch moved once, at 92 % of the peak;
- issue: instructions of all warps on four schedulers, with one every two cycles for integers and
  selections, one every eight for special functions;
- matrix: multiply-adds of the matrix products;
- shared: cycles of the port of shared memory, without bank conflicts;
- latency: the time of one program alone, times the waves of programs. A warp alone issues every
  third cycle, a barrier costs 30, and a load that finds no buffer to run ahead in waits 750 cycles.

The first four grow with the programs of the busiest multiprocessor, the last one with the number of
waves, so that partial waves cost what they cost. Not modelled: bank conflicts, reads that hit the
L2 cache other than for free, DRAM pages, clocks that power lowers.

The model is uncalibrated: no chip has confirmed it. Differences of 10 % mean nothing.

python -m linclip_kernels.linear_attention.compiled.time_model
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from linclip_kernels.linear_attention.compiled.counts import (
    KernelCounts,
    LoopCounts,
    count_kernel,
)
from linclip_kernels.linear_attention.compiled.resources import FORMULAS, Case
from linclip_kernels.linear_attention.triton_backend.partition import Chip, Launch

__all__ = ["CHIPS", "Prediction", "Speed", "predict", "predict_case"]


class Speed(NamedTuple):
    """What a chip can do, from its data sheet."""

    capability: int
    num_sms: int
    clock: float  # cycles per second
    peak_bytes: float  # of DRAM per second
    fp32_clocks: int  # of a scheduler for one instruction of a warp
    multiply_adds: dict[str, int]  # per multiprocessor and cycle, by matrix instruction

    @property
    def copy_bytes(self) -> float:
        return 0.92 * self.peak_bytes


_HOPPER = {"hmma": 1024, "hgmma": 2048}  # mma.sync reaches half of the rate of wgmma: assumed
CHIPS = {
    "A100": Speed(80, 108, 1.41e9, 2.039e12, 2, {"hmma": 1024}),
    "H100": Speed(90, 132, 1.755e9, 3.35e12, 1, _HOPPER),
    "H200": Speed(90, 132, 1.755e9, 4.8e12, 1, _HOPPER),
    "B200": Speed(100, 148, 1.85e9, 8e12, 1, {"hmma": 1024, "tcgen05": 4096}),
}
#: Assumptions in cycles, never measured.
CLOCKS_PER_INSTRUCTION, CLOCKS_PER_BARRIER, MEMORY_LATENCY = 3, 30, 750
#: Between two kernels of a CUDA graph.
LAUNCH_SECONDS = 1.5e-6


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one kernel.

    Attributes:
        kernel: Its name.
        seconds: The time, with the launch.
        limit: What bounds it.
        bytes: Of the launch's tensors.
        programs_per_sm: Programs that run at the same time on a multiprocessor.
        waves: Programs over those that run at the same time on the chip.
    """

    kernel: str
    seconds: float
    limit: str
    bytes: int
    programs_per_sm: int
    waves: float


def predict(counts: KernelCounts, launch: Launch, chip: Speed) -> Prediction:
    """Predict the time of one launch.

    Args:
        counts: The counts of its kernel, compiled for this chip.
        launch: The launch, whose grid and tensors give trips and bytes.
        chip: One of ``CHIPS``.

    Returns:
        The time and its bound.
    """
    usage, programs = counts.usage, prod(launch.grid)
    tensors = list(_tensors(launch.arguments))
    trips = _trips(counts.loops, launch, tensors)
    per_sm, slots = ceil(programs / chip.num_sms), usage.blocks_per_sm * chip.num_sms
    warps, num_bytes = usage.num_warps, sum(x.numel() * x.element_size() for x in tensors)
    busy = {
        "issue": sum(n * _issue_clocks(loop, chip) for loop, n in trips) * warps / 4,
        "matrix": sum(n * _matrix_clocks(loop, chip) for loop, n in trips),
        "shared": sum(n * loop.shared_clocks for loop, n in trips) * warps,
    }
    alone = sum(n * _clocks_alone(loop, chip) for loop, n in trips)
    seconds = {name: per_sm * clocks / chip.clock for name, clocks in busy.items()}
    seconds["latency"] = ceil(programs / slots) * alone / chip.clock
    seconds["bandwidth"] = num_bytes / chip.copy_bytes
    limit = max(seconds, key=lambda name: seconds[name])
    return Prediction(
        kernel=usage.kernel,
        seconds=seconds[limit] + LAUNCH_SECONDS,
        limit=limit,
        bytes=num_bytes,
        programs_per_sm=min(usage.blocks_per_sm, per_sm),
        waves=programs / slots,
    )


def predict_case(case: Case, chip: Speed) -> tuple[list[Prediction], list[Prediction]]:
    """Predict the kernels of a forward, and those of a backward.

    Args:
        case: The inputs.
        chip: One of ``CHIPS``.
    """
    directions = case.directions(Chip(chip.num_sms, chip.capability))
    forward, backward = (
        [predict(count_kernel(case, launch, chip.capability), launch, chip) for launch in launches]
        for launches in directions
    )
    return forward, backward


def _issue_clocks(loop: LoopCounts, chip: Speed) -> int:
    """Return the cycles of a scheduler, or of its busiest pipe, for one warp and iteration."""
    floats = chip.fp32_clocks * loop.groups["fp32"] + 2 * loop.groups["imad"]
    return max(loop.instructions, 2 * loop.groups["int"], floats, 8 * loop.groups["mufu"])


def _matrix_clocks(loop: LoopCounts, chip: Speed) -> float:
    return sum(number / chip.multiply_adds[kind] for kind, number in loop.products.items())


def _clocks_alone(loop: LoopCounts, chip: Speed) -> float:
    """Return the time of one iteration of a program that has the multiprocessor for itself."""
    clocks: float = (
        CLOCKS_PER_INSTRUCTION * loop.instructions + CLOCKS_PER_BARRIER * loop.groups["bar"]
    )
    clocks += _matrix_clocks(loop, chip)
    if not any(loop.groups[name] for name in ("ldg", "ldgsts", "tma")):
        return clocks
    ahead = (loop.plan.buffers or 1) - 1
    return clocks + max(0, MEMORY_LATENCY - ahead * clocks)


def _trips(
    loops: Sequence[LoopCounts], launch: Launch, tensors: Sequence[Tensor]
) -> list[tuple[LoopCounts, float]]:
    """Return how often a program runs each loop: over its tokens, or over the states of parts.

    A while loop runs once, as those do that repeat all after NaN. A loop in a loop over tokens is
    over the tokens of the outer one's tile if its step is smaller, otherwise over those up to the
    tile, or from it on.
    """
    meta = launch.arguments.get("META")
    rows = max((x.shape[0] * x.shape[1] * x.shape[2] for x in _views(launch)), default=0)
    states = max(x.shape[0] * x.shape[1] for x in tensors if x.dim() == 4) / launch.grid[0]
    found: list[tuple[LoopCounts, float]] = []
    around: dict[str, tuple[int, float]] = {}  # step and trips of the loops over tokens
    for loop in loops:
        step, outer = loop.plan.step or 1, around.get(loop.loop.rpartition(".")[0])
        if rows and step < 8 and meta is not None:  # tiles are counted, not tokens
            step = meta.BLOCK_N
        if loop.loop == "once" or loop.plan.is_while:
            number = 1.0
        else:
            number = float(ceil((rows / prod(launch.grid) if rows else states) / step))
            if outer is not None and outer[0] <= step:
                number = outer[1] * (outer[1] + 1) / 2
            around[loop.loop] = step, number
        found.append((loop, number))
    return found


def _views(launch: Launch) -> Iterator[Tensor]:
    """Yield the tensors [B, N, H, D] that come with their strides."""
    for argument in launch.arguments.values():
        if isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[0], Tensor):
            yield argument[0]


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (dict, tuple)):
        for one in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _tensors(one)


#: (B * H, N) of the printed table; by whether the mask is causal.
SHAPES = {
    False: ((3072, 197), (256, 4096), (16, 4096), (16, 16_384), (256, 16_384), (16, 2**20)),
    True: ((2048, 77), (256, 4096), (16, 2**20)),
}
#: Tensors of B * N * H * D elements that a direction must move at least.
TENSORS = {"forward": 4, "backward": 7}


def shape_cases() -> Iterator[Case]:
    """Yield the cases of the printed table."""
    for is_causal, shapes in SHAPES.items():
        for formula, (heads, num_tokens) in product(FORMULAS, shapes):
            yield Case(formula._replace(causal=is_causal), num_tokens, heads=heads)


def _rows(case: Case, name: str) -> list[dict[str, object]]:
    """Return the table's rows of a case on a chip, one per direction."""
    rows: list[dict[str, object]] = []
    chip = CHIPS[name]
    for direction, kernels in zip(TENSORS, predict_case(case, chip), strict=True):
        seconds = sum(one.seconds for one in kernels)
        least = TENSORS[direction] * case.heads * case.num_tokens * case.dim * 2
        parts = (f"{one.kernel} {1e6 * one.seconds:.1f} ({one.limit})" for one in kernels)
        rows.append(
            {
                "chip": name,
                "case": str(case),
                "direction": direction,
                "us": f"{1e6 * seconds:.1f}",
                "share_of_copy": f"{least / chip.copy_bytes / seconds:.2f}",
                "kernels": "; ".join(parts),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted times; uncalibrated")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the table into this file too")
    options = parser.parse_args()
    chosen = [case for case in shape_cases() if options.match in str(case)]
    jobs = [(case, name) for name in options.chips for case in chosen]
    if not jobs:
        parser.error(f"match ({options.match!r}) must be part of the name of a case")
    print("uncalibrated: differences of 10 % mean nothing")
    columns = "{:6}{:52}{:10}{:>10}{:>15}  {}"
    with ProcessPoolExecutor(min(4, len(jobs))) as pool:
        rows: list[dict[str, object]] = []
        for found in pool.map(_rows, *zip(*jobs, strict=True)):
            if not rows:
                print(columns.format(*found[0]))
            for row in found:
                print(columns.format(*row.values()), flush=True)
            rows += found
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

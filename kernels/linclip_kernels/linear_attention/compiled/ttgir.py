"""Loops of a kernel in Triton's GPU dialect, for what its machine code does not show."""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

__all__ = ["LoopPlan", "copy_sizes", "loop_plans"]


class LoopPlan(NamedTuple):
    """What the machine code of a loop does not show.

    Attributes:
        buffers: Tiles that each tensor has room for, the least of those that the loop loads.
        step: By how much the variable of the loop grows; None if it is no constant.
        is_while: Whether data decide when it ends.
    """

    buffers: int | None = None
    step: int | None = None
    is_while: bool = False


def loop_plans(ttgir: str, num_loops: int) -> list[LoopPlan]:
    """Return the plans of the loops that move or multiply data, in the order of the code.

    Args:
        ttgir: Triton's GPU dialect, ``asm["ttgir"]`` of a compiled kernel.
        num_loops: The loops of the machine code. Where the compiler has split or joined loops, each
            gets the least of all plans.
    """
    sizes = {
        found[1]: int(found[2])
        for found in re.finditer(r"(%\w+) = ttg\.local_alloc : .*memdesc<(\d+)x\d+x", ttgir)
    }
    found: list[LoopPlan] = []
    for own, whole in _loop_texts(ttgir):
        if re.search(r"\btt\.(dot|load|store|descriptor)|_dot |gen5_mma|async_|tt\.atomic", whole):
            used = re.findall(r"memdesc_index (%\w+)\[", own)
            held = min((sizes[name] for name in used if name in sizes), default=None)
            step = re.search(r"scf\.for .* step %c(\d+)_i", own)
            found.append(LoopPlan(held, int(step[1]) if step else None, "scf.while" in own))
    if len(found) == num_loops:
        return found
    buffers = [plan.buffers for plan in found if plan.buffers is not None]
    steps = [plan.step for plan in found if plan.step is not None]
    return [LoopPlan(min(buffers, default=None), min(steps, default=None))] * num_loops


def _loop_texts(ttgir: str) -> list[tuple[str, str]]:
    """Return every loop in order of its beginning: without the loops inside it, and with them."""
    own: list[list[str]] = []
    whole: list[list[str]] = []
    open_loops: list[tuple[int, int]] = []  # the number of a loop, and the braces around it
    depth = 0
    for line in ttgir.splitlines():
        begins = "scf.for" in line or "scf.while" in line
        if begins:
            open_loops.append((len(own), depth))
            own.append([])
            whole.append([])
        if open_loops:
            own[open_loops[-1][0]].append(line)
        for number, _ in open_loops:
            whole[number].append(line)
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][1] and not begins:
            open_loops.pop()
    return [("\n".join(one), "\n".join(all_)) for one, all_ in zip(own, whole, strict=True)]


def copy_sizes(ttgir: str) -> Iterator[int]:
    """Yield the bytes of every copy of the tensor memory accelerator."""
    for line in ttgir.splitlines():
        if "async_tma_copy" in line:
            # The first one is the barrier's.
            *sizes, kind = re.findall(r"memdesc<([\dx]+)x([a-z]+)(\d+)", line)[-1]
            yield prod(map(int, sizes[0].split("x"))) * int(kind) // 8

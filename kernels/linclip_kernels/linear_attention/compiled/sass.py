"""Loops of a compiled kernel, found in its machine code as nvdisasm prints it.

A loop is a natural loop: the blocks from which a jump back reaches a header that dominates them.
What hardly ever runs is left out by three rules. A branch decided by a comparison of floats skips a
slow path, such as a recomputation after NaN, and so does a branch around a loop without matrix
products inside a loop with them. The target of BRA.DIV serves warps that have diverged.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Instruction", "Loop", "find_loops"]

_LINE = re.compile(r"/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<rest>[^;]+);")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"\(([.$\w]+)\)")
_PREDICATE = re.compile(r"U?P\d")
_MATRIX = re.compile(r"[HIDQ]G?MMA|UTC\w*MMA")
_MEMORY = re.compile(r"LDG|STG|UTMALDG|UTMASTG|UBLKCP|RED|ATOM")


class Instruction(NamedTuple):
    opcode: str  # with its modifiers, "LDG.E.128"
    operands: str
    guard: str = ""  # the predicate that must hold, "!P0"

    @property
    def ends_block(self) -> bool:
        """Whether it can go elsewhere; a call of a label inside the kernel is a jump."""
        name = self.opcode.split(".")[0]
        calls_label = name == "CALL" and "(.L" in self.operands
        return name in ("BRA", "EXIT", "RET", "BRX", "JMP") or calls_label

    @property
    def is_conditional(self) -> bool:
        return self.guard not in ("", "PT", "UPT") or "," in self.operands

    def writes(self) -> str | None:
        """Return the predicate register that is written, if there is one."""
        first = [operand.strip() for operand in self.operands.split(",")[:2]]
        return next((operand for operand in first if _PREDICATE.fullmatch(operand)), None)


class Loop(NamedTuple):
    """The instructions of one iteration without those of inner loops; depth 0 is no loop."""

    depth: int
    instructions: list[Instruction]


def find_loops(sass: str) -> list[Loop]:
    """Return the code outside loops, then the loops that move or multiply data.

    Args:
        sass: The output of ``nvdisasm -c`` for one kernel.
    """
    code = _Code(sass)
    found = [Loop(0, code.instructions(code.usual - set().union(*code.loops.values())))]
    for header, body in sorted(code.loops.items()):
        if header in code.usual and code.works(body):
            outer = [other for other in code.loops.values() if header in other and other > body]
            depth = 1 + sum(code.works(other) for other in outer)
            found.append(Loop(depth, code.instructions(code.own(header) & code.usual)))
    return found


@dataclass(frozen=True)
class _Code:
    """The control flow of a kernel; blocks are numbered in the order of their addresses."""

    sass: str

    @cached_property
    def _blocks(self) -> tuple[list[list[Instruction]], dict[str, int]]:
        blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for line in self.sass.splitlines():
            if label := _LABEL.match(line):
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
            elif found := _LINE.search(line):
                opcode, _, operands = found["rest"].strip().partition(" ")
                blocks[-1].append(Instruction(opcode, operands.strip(), found["guard"] or ""))
                if blocks[-1][-1].ends_block:
                    blocks.append([])
        return blocks, labels

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for block in sorted(blocks) for one in self._blocks[0][block]]

    def _side_exits(self, number: int) -> list[int]:
        """Return the blocks that follow one block, the next one first."""
        blocks, labels = self._blocks
        last = blocks[number][-1] if blocks[number] else None
        following = [number + 1] if number + 1 < len(blocks) else []
        if last is None or not last.ends_block:
            return following
        target = _TARGET.search(last.operands)
        jump = [labels[target[1]]] if target is not None and target[1] in labels else []
        if last.opcode.startswith("BRA.DIV"):
            return following
        return following * last.is_conditional + jump

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        """The blocks that follow each block that can be reached."""
        found: dict[int, list[int]] = {}
        waiting = [0]
        while waiting:
            number = waiting.pop()
            if number not in found:
                found[number] = self._side_exits(number)
                waiting += found[number]
        return found

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """The blocks through which every path to a block leads, with itself."""
        everything = set(self.successors)
        found = {number: set(everything) for number in everything}
        found[0] = {0}
        before = self._predecessors
        changed = True
        while changed:
            changed = False
            for number in sorted(everything - {0}):
                update = set.intersection(*(found[one] for one in before[number])) | {number}
                changed |= update != found[number]
                found[number] = update
        return found

    @cached_property
    def _predecessors(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {number: set() for number in self.successors}
        for number, following in self.successors.items():
            for one in following:
                found[one].add(number)
        return found

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of every loop by its header, apart from waits for a barrier in memory."""
        found: dict[int, set[int]] = {}
        for number, following in self.successors.items():
            for header in following:
                if header in self.dominators[number]:
                    body = found.setdefault(header, {header})
                    waiting = [number]
                    while waiting:
                        one = waiting.pop()
                        if one not in body:
                            body.add(one)
                            waiting += self._predecessors[one]
        waits = [h for h, body in found.items() if not self.works(body) and self._is_wait(body)]
        return {header: body for header, body in found.items() if header not in waits}

    def _is_wait(self, body: set[int]) -> bool:
        return any("TRYWAIT" in one.opcode for one in self.instructions(body))

    def works(self, body: set[int]) -> bool:
        """Whether a loop moves data from or to global memory, or multiplies matrices."""
        return any(
            _MATRIX.match(one.opcode) or _MEMORY.match(one.opcode)
            for one in self.instructions(body)
        )

    def own(self, header: int) -> set[int]:
        """Return the blocks of a loop that no inner loop contains."""
        body = self.loops[header]
        inner = [other for other in self.loops.values() if other < body]
        return body - set().union(*inner)

    @cached_property
    def usual(self) -> set[int]:
        """All reachable blocks without slow paths."""
        slow = {number for side in self._slow_sides() for number in self._dominated(side)}
        return set(self.successors) - slow

    def _dominated(self, side: int) -> set[int]:
        return {number for number in self.successors if side in self.dominators[number]}

    def _slow_sides(self) -> Iterator[int]:
        """Yield the first block of every slow path."""
        for number, following in self.successors.items():
            for side, other in zip(following, reversed(following), strict=True):
                if len(following) < 2 or side == other or number == side:
                    continue
                skipped = self._dominated(side)
                if not any(other in self.successors[one] for one in skipped):
                    continue
                if self._compares_floats(number) or self._skips_loop(number, skipped):
                    yield side

    def _compares_floats(self, number: int) -> bool:
        *before, branch = self._blocks[0][number]
        source = branch.guard if branch.guard else branch.operands
        return any(self._from_floats(p, before) for p in _PREDICATE.findall(source))

    def _from_floats(self, predicate: str, before: list[Instruction]) -> bool:
        for i in reversed(range(len(before))):
            one = before[i]
            if one.writes() == predicate:
                if one.opcode.startswith(("PLOP3", "UPLOP3", "VOTE")):
                    sources = _PREDICATE.findall(one.operands)[1:]
                    return any(self._from_floats(p, before[:i]) for p in sources)
                return one.opcode.startswith(("FSETP", "HSETP2", "DSETP"))
        return False

    def _skips_loop(self, number: int, skipped: set[int]) -> bool:
        """Whether the skipped blocks hold a loop without products in a loop with products."""
        outer = [body for body in self.loops.values() if number in body and skipped < body]
        inner = [body for header, body in self.loops.items() if header in skipped]
        return any(map(self._multiplies, outer)) and bool(inner) and not self._multiplies(skipped)

    def _multiplies(self, body: set[int]) -> bool:
        return any(_MATRIX.match(one.opcode) for one in self.instructions(body))

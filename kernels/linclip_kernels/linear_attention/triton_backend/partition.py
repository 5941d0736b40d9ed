"""How the work of one call is cut into programs, and kernel launches as values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from linclip_kernels.linear_attention.variant import Form

__all__ = [
    "Call",
    "Chip",
    "Launch",
    "Split",
    "max_value_block",
    "run",
    "score_arguments",
    "split_tokens",
]

#: Tokens of one part. The upper bound caps what a single accumulator adds up.
MIN_PART, MAX_PART = 512, 4096
#: Tokens of a causal part: within it the cost is quadratic, between parts there are states to move.
CAUSAL_PART = 256


@dataclass(frozen=True)
class Chip:
    """What of a GPU decides how work is cut; the default stands in for one (the interpreter)."""

    num_sms: int = 132
    capability: int = 90

    @property
    def is_large(self) -> bool:
        """Data-centre chips from Hopper on, whose matrix unit reads operands from shared memory."""
        return 90 <= self.capability < 120

    @staticmethod
    def of(device: torch.device) -> "Chip":
        if device.type != "cuda":
            return Chip()
        properties = torch.cuda.get_device_properties(device)
        return Chip(properties.multi_processor_count, 10 * properties.major + properties.minor)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as a value: it can be run, or compiled for another machine."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in their order on the device of their tensors; on meta tensors, none."""
    if device.type == "meta":
        return
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            launch.kernel[launch.grid](
                **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
            )


@dataclass(frozen=True)
class Split:
    """The programs of one call: each works on one head and one part of one sequence.

    Parts are numbered through, sequence by sequence. Without boundaries all B sequences have N
    tokens and the same number of parts; with boundaries a table says where each part lies.
    """

    batch: int
    num_tokens: int  # N
    heads: int
    key_dim: int
    value_dim: int
    boundaries: tuple[int, ...] | None
    part: int  # tokens per part, a multiple of block_tokens
    block_tokens: int
    block_key: int
    block_value: int
    num_warps: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def parts_of_sequences(self) -> list[int]:
        """Parts of every sequence; an empty sequence has none."""
        if self.boundaries is None:
            return [triton.cdiv(self.num_tokens, self.part)] * self.batch
        return [triton.cdiv(end - begin, self.part) for begin, end in pairwise(self.boundaries)]

    @property
    def num_sequences(self) -> int:
        return len(self.parts_of_sequences)

    @property
    def is_whole(self) -> bool:
        """Whether every sequence is one part, so that a program sees all of its tokens."""
        return all(num_parts == 1 for num_parts in self.parts_of_sequences)

    @property
    def grid(self) -> tuple[int]:
        return (sum(self.parts_of_sequences) * self.heads,)

    def empty_states(self, num_states: int) -> Tensor:
        shape = num_states, self.heads, self.key_dim + 1, self.value_dim + 1
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_parts(self) -> Tensor:
        """Room for the state of every part."""
        return self.empty_states(sum(self.parts_of_sequences))

    @cached_property
    def table(self) -> Tensor | None:
        """Per part: sequence, its first token in the batch, its length, the part's first token."""
        if self.boundaries is None:
            return None
        rows = [
            (i, begin, end - begin, first)
            for i, (begin, end) in enumerate(pairwise(self.boundaries))
            for first in range(0, end - begin, self.part)
        ]
        return self.to_device(rows)

    @cached_property
    def first_parts(self) -> Tensor | None:
        """Number of the first part of every sequence, and the number of parts behind them."""
        if self.boundaries is None:
            return None
        counts = torch.tensor([0, *self.parts_of_sequences])
        return self.to_device(counts.cumsum(0).tolist())

    def to_device(self, values: Sequence[Any]) -> Tensor:
        """Integers from the host, without waiting for the device."""
        pinned = self.device.type == "cuda"
        host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
        return host.to(self.device, non_blocking=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """What every kernel over tokens takes."""
        return {
            "p_table": self.table,
            "num_tokens": self.num_tokens,
            "num_heads": self.heads,
            "num_parts": self.parts_of_sequences[0],
            "part": self.part,
            "D": self.key_dim,
            "DV": self.value_dim,
            "BLOCK_N": self.block_tokens,
            "BLOCK_D": self.block_key,
            "BLOCK_DV": self.block_value,
            "ROWS_D": self._rows_at_once(self.block_key),
            "ROWS_DV": self._rows_at_once(self.block_value),
        }

    def _rows_at_once(self, columns: int) -> int:
        """Rows of a tile that a program loads with one instruction of 16 bytes per thread."""
        row_bytes = columns * (2 if self.dtype == torch.bfloat16 else 4)
        return max(1, min(self.block_tokens, self.num_warps * 32 * 16 // row_bytes))


class Call(NamedTuple):
    """What the launches of a forward and of a backward start from."""

    q: Tensor  # [B, N, H, D]
    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, Dv]
    initial: Tensor | None  # state [S, H, D + 1, Dv + 1]
    split: Split
    form: Form
    scale: float  # of all rows of the unnormalised form
    factor: Tensor | None  # of single ones, [B, N]

    @property
    def is_whole(self) -> bool:
        """Whether programs see all there is to see in one launch."""
        return self.split.is_whole and self.initial is None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every kernel that knows scores takes."""
        return score_arguments(
            self.split,
            self.form,
            self.scale,
            self.factor,
            frees_single_key=self.initial is None,
        )


def score_arguments(
    split: Split,
    form: Form,
    scale: float,
    factor: Tensor | None,
    *,
    frees_single_key: bool = True,
) -> dict[str, Any]:
    """What every kernel that knows scores takes.

    Args:
        scale: Of all rows of the unnormalised form.
        factor: Of single ones, [B, N].
        frees_single_key: Whether a sequence of one key is one where the form sets its weight.
    """
    return {
        **split.arguments,
        "scale": scale,
        "p_factor": factor,
        "NORMALIZED": form.normalized,
        "QK_NORM": form.qk_norm,
        "FEATURE_MAP": form.feature_map,
        "HAS_CONSTANT": form.has_constant,
        "FREE_SINGLE_KEY": form.frees_single_key and frees_single_key,
    }


def max_value_block(q: Tensor, chip: Chip | None = None) -> int:
    """Columns of v whose state one program holds; wider values are computed block by block."""
    chip = chip or Chip.of(q.device)
    block_key = max(16, triton.next_power_of_2(q.shape[-1]))
    room = 2**12 if q.dtype == torch.bfloat16 else 2**11
    if q.dtype == torch.bfloat16 and chip.is_large and block_key == 128:
        room = 2**13
    return min(128, max(16, room // block_key))


def split_tokens(
    q: Tensor,
    value_dim: int,
    form: Form,
    boundaries: list[int] | None = None,
    *,
    backward: bool,
    chip: Chip | None = None,
) -> Split:
    """Choose parts and blocks from (B, H, N, D), the dtype and the chip.

    Bidirectional: one part per sequence if that gives about four programs per multiprocessor;
    otherwise as many parts as are wanted for that, of 512 to 4096 tokens. Causal: parts of 256.

    Args:
        q: Queries or keys, [B, N, H, D].
        value_dim: Width of the values, at most :func:`max_value_block`.
        form: Which form.
        boundaries: Boundaries of the sequences; None: B sequences of N tokens.
        backward: Whether the split is for the backward, which holds more in registers.
        chip: None: that of q.
    """
    chip = chip or Chip.of(q.device)
    batch, num_tokens, heads, key_dim = q.shape
    block_key, block_value = (max(16, triton.next_power_of_2(x)) for x in (key_dim, value_dim))
    # The largest blocks whose tiles and states fit into registers (resources.py tells).
    words = max(block_key, block_value) * (1 if q.dtype == torch.bfloat16 else 2)
    block_tokens = 32 if form.causal or backward else 64
    block_tokens = max(16, min(block_tokens, block_tokens * 64 // words))
    needs_more = form.normalized and not form.causal and not chip.is_large
    if backward and (needs_more or form.feature_map in ("relu", "softplus")):
        block_tokens = 16
    parts_per_batch = triton.cdiv(4 * chip.num_sms, batch * heads)
    part = min(max(triton.cdiv(num_tokens, parts_per_batch), MIN_PART), MAX_PART)
    part = CAUSAL_PART if form.causal else part
    return Split(
        batch=batch,
        num_tokens=num_tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        boundaries=None if boundaries is None else tuple(boundaries),
        part=triton.cdiv(part, block_tokens) * block_tokens,
        block_tokens=block_tokens,
        block_key=block_key,
        block_value=block_value,
        num_warps=4 if words <= 64 else 8,
        dtype=q.dtype,
        device=q.device,
    )

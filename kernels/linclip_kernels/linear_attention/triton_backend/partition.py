"""The partition of one call into programs, and kernel launches as values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from linclip_kernels.linear_attention.variant import Variant

__all__ = [
    "Call",
    "Chip",
    "Launch",
    "Partition",
    "max_value_block",
    "partition_tokens",
    "run",
    "to_device",
    "tokens_per_part",
]

#: Tokens of one part. The upper bound, twice as high for bfloat16, limits how many terms a single
#: accumulator adds up.
MIN_PART, MAX_PART = 256, 4096
#: Programs that a multiprocessor holds at least, and how many tokens of a part cost a program as
#: much as a state that it reads or writes.
PROGRAMS_PER_SM, TOKENS_OF_STATE = 2, 32


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that the partition depends on; by default those of an H100."""

    num_sms: int = 132
    #: As Triton names it: the compute capability times ten, or the name of AMD's chip, "gfx942".
    arch: int | str = 90

    @property
    def is_amd(self) -> bool:
        return isinstance(self.arch, str)

    @property
    def is_large(self) -> bool:
        """Data-centre chips from Hopper on, whose matrix unit reads operands from shared memory."""
        return isinstance(self.arch, int) and 90 <= self.arch < 120

    @property
    def has_wgmma(self) -> bool:
        """Hopper, where products of 64 rows take operands from shared memory.

        Those of Blackwell pass through a memory of their own. By the counts of instructions and
        spills its kernels are better with tiles of 32, which it multiplies like older chips.
        """
        return isinstance(self.arch, int) and 90 <= self.arch < 100

    @staticmethod
    def of(device: torch.device) -> "Chip":
        """Return the chip of a CUDA device, the default chip for any other device."""
        if device.type != "cuda":
            return Chip()
        properties = torch.cuda.get_device_properties(device)
        arch: int | str = 10 * properties.major + properties.minor
        if torch.version.hip is not None:  # "gfx942:sramecc+:xnack-", whose capability is 9.4
            arch = properties.gcnArchName.partition(":")[0]
        return Chip(properties.multi_processor_count, arch)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as a value: it can be run, or compiled for another machine."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in order on the device of their tensors; on the meta device do nothing."""
    if device.type == "meta":
        return
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            launch.kernel[launch.grid](
                **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
            )


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Copy integers from the host without waiting for the device."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Meta(NamedTuple):
    """The compile-time constants of a kernel."""

    D: int
    DV: int
    BLOCK_N: int  # tokens of a tile
    BLOCK_D: int
    BLOCK_DV: int
    QK_NORM: bool
    FEATURE_MAP: str
    HAS_CONSTANT: bool
    FP32_DOT: str  # the precision of products of float32
    COLUMNS: int  # of matrices that stand for a vector
    NORMALIZED: bool = False
    CENTERED: bool = False
    FIX_SINGLE_KEY: bool = False
    LENGTH_FACTOR: str = "none"  # how Eq. 7's rows depend on their number of keys
    ROWS_DIFFER: bool = False  # in their factor of values
    STATE_GRADIENT: bool = False  # one comes in, also of sums that the scores do not need
    RECOMPUTE: bool = False  # addresses of stored rows, where registers are short


class Schedule(NamedTuple):
    """The values that a program needs, beside lengths, to find its part."""

    p_table: Tensor | None
    num_heads: int


class RowFactor(NamedTuple):
    """The factor of every row of an unnormalised variant: one number times a table [B, N]."""

    scale: float
    qk_scale: float
    p_table: Tensor | None


@dataclass(frozen=True)
class Partition:
    """The programs of one call: each works on one head and one part of one sequence.

    Parts are numbered consecutively, sequence by sequence. Without boundaries all B sequences have
    N tokens and the same number of parts; with boundaries a table says where each part lies.
    """

    variant: Variant
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
    device: torch.device
    chip: Chip

    @cached_property
    def parts_of_sequences(self) -> list[int]:
        """The number of parts of every sequence; an empty sequence has none."""
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

    def empty_states(self, num_states: int) -> Tensor:
        shape = num_states, self.heads, self.key_dim + 1, self.value_dim + 1
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_parts(self) -> Tensor:
        """Return room for the state of every part."""
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
        return to_device(rows, self.device)

    @cached_property
    def first_parts(self) -> Tensor | None:
        """The number of the first part of every sequence, and the total number of parts."""
        if self.boundaries is None:
            return None
        counts = torch.tensor([0, *self.parts_of_sequences])
        return to_device(counts.cumsum(0).tolist(), self.device)

    @property
    def columns(self) -> int:
        """The columns of a matrix that stands for a vector, of which three hold its parts.

        Triton multiplies eight columns by mma.sync, with fewer instructions and registers. Counts
        are better with 16 on wgmma, for buffers and barriers, and in causal kernels of large chips.
        """
        prefers_wide = self.variant.causal or self.chip.has_wgmma
        if self.chip.is_amd or (self.chip.is_large and prefers_wide):
            return 8 if self.is_short_of_registers else 16
        return 8

    @property
    def is_short_of_registers(self) -> bool:
        """Bidirectional Eq. 4 with tiles of 128 tokens."""
        is_bidirectional = not self.variant.causal
        return is_bidirectional and self.variant.normalized and self.block_tokens == 128

    @property
    def meta(self) -> Meta:
        """The constants of kernels that compute no scores."""
        return Meta(
            D=self.key_dim,
            DV=self.value_dim,
            BLOCK_N=self.block_tokens,
            BLOCK_D=self.block_key,
            BLOCK_DV=self.block_value,
            QK_NORM=self.variant.qk_norm,
            FEATURE_MAP=self.variant.feature_map,
            HAS_CONSTANT=self.variant.has_constant,
            FP32_DOT="ieee" if self.chip.is_amd else "tf32x3",  # AMD has no three TF32 products
            COLUMNS=self.columns,
        )

    def launch(self, kernel: Any, arguments: dict[str, Any], num_stages: int = 2) -> Launch:
        """Return the launch of a kernel over tokens, one program per part and head."""
        common = {
            "schedule": Schedule(self.table, self.heads),
            "num_tokens": self.num_tokens,
            "num_parts": self.parts_of_sequences[0],
            "part": self.part,
        }
        grid = (sum(self.parts_of_sequences) * self.heads,)
        # Triton 3.6 cannot compile the pipelined loops of the causal kernels for AMD.
        num_stages = 1 if self.chip.is_amd else num_stages
        return Launch(kernel, grid, arguments | common, self.num_warps, num_stages)


class Call(NamedTuple):
    """The inputs of one call, or of one of the halves of it, which lacks q or k and v."""

    q: Tensor | None  # [B, N, H, D]
    k: Tensor | None  # [B, N, H, D]
    v: Tensor | None  # [B, N, H, Dv]
    initial: Tensor | None  # state [S, H, D + 1, Dv + 1]
    partition: Partition
    factor: RowFactor

    @property
    def is_whole(self) -> bool:
        """Whether one launch computes everything: no other part and no state comes in."""
        return self.partition.is_whole and self.initial is None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of every kernel that computes scores."""
        variant = self.partition.variant
        length_factor = "none" if self.factor.p_table is None else "table"
        if variant.has_inverse_length:
            length_factor = "inverse"
        meta = self.partition.meta._replace(
            NORMALIZED=variant.normalized,
            LENGTH_FACTOR=length_factor,
            ROWS_DIFFER=variant.normalized or variant.centered or length_factor != "none",
            CENTERED=variant.centered,
            RECOMPUTE=self.partition.is_short_of_registers,
            FIX_SINGLE_KEY=variant.fixes_single_key and self.initial is None,
        )
        return {"factor": self.factor, "META": meta}


def max_value_block(q: Tensor, chip: Chip | None = None) -> int:
    """Return how many columns of v one program's state holds; wider values are split in blocks."""
    chip = chip or Chip.of(q.device)
    block_key = max(16, triton.next_power_of_2(q.shape[-1]))
    room = 2**12 if q.dtype == torch.bfloat16 else 2**11
    if q.dtype == torch.bfloat16 and chip.is_large and block_key == 128:
        room = 2**13
    return min(128, max(16, room // block_key))


def tokens_per_part(num_tokens: int, num_heads: int, num_sms: int, most: int) -> int:
    """Return how many tokens one program works on, of which it has 256 to ``most``.

    Multiprocessors hold at least two programs each, so that work is done in waves of twice their
    number. Chosen is what costs least: waves times the tokens of a part, where a sequence in
    several parts pays for the states between them.

    Args:
        num_tokens: N.
        num_heads: Heads of all sequences together.
        num_sms: Multiprocessors of the chip.
        most: Largest part.
    """
    at_once = PROGRAMS_PER_SM * num_sms
    fewest = -(-num_tokens // most)
    # More than eight waves are not worth any more states.
    highest = max(fewest, min(num_tokens // MIN_PART, fewest + -(-8 * at_once // num_heads)))

    def cost(num_parts: int) -> int:
        waves = -(-num_parts * num_heads // at_once)
        states = 1 if num_parts == 1 else 3
        return waves * (-(-num_tokens // num_parts) + states * TOKENS_OF_STATE)

    return -(-num_tokens // min(range(fewest, highest + 1), key=cost))


def partition_tokens(
    q: Tensor,
    value_dim: int,
    variant: Variant,
    boundaries: list[int] | None = None,
    *,
    chip: Chip | None = None,
) -> Partition:
    """Choose parts and blocks from (B, H, N, D), the dtype and the chip.

    Args:
        q: Queries or keys, [B, N, H, D].
        value_dim: Width of the values, at most :func:`max_value_block`.
        variant: The variant to compute.
        boundaries: Boundaries of the sequences; None: B sequences of N tokens.
        chip: The GPU to partition for; None: that of q.
    """
    chip = chip or Chip.of(q.device)
    batch, num_tokens, heads, key_dim = q.shape
    block_key, block_value = (max(16, triton.next_power_of_2(x)) for x in (key_dim, value_dim))
    # The largest blocks whose tiles and states fit into registers: compiled/resources.py reports.
    words = max(block_key, block_value) * (1 if q.dtype == torch.bfloat16 else 2)
    is_narrow = q.dtype == torch.bfloat16
    block_tokens = max(16, (2048 if is_narrow or variant.causal else 4096) // words)
    if is_narrow and chip.has_wgmma:
        # Eight warps need 128 rows: the products with few columns give every four of them 64.
        block_tokens = 4096 // words if words > (64 if variant.causal else 128) else max(64, words)
    most = MAX_PART * (2 if q.dtype == torch.bfloat16 else 1)
    part = tokens_per_part(num_tokens, batch * heads, chip.num_sms, most)
    return Partition(
        variant=variant,
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
        device=q.device,
        chip=chip,
    )

# mypy: allow-untyped-defs
# ruff: noqa: RET505 (Triton needs the else where a branch is chosen at compile time)
"""What the bidirectional and the causal Triton kernels share: tiles, the state, the split of N.

The state of one (batch, head) and one part of the tokens lies in one row of a float32 buffer
[parts, B * H, state_size]: S = sum of x-hat y^T [D, Dv], w = sum of y [Dv], and
z = sum of e x-hat [num_value_blocks, D], whose rows add up. A program works on one (batch, head),
one part of the tokens and one block of Dv; each block's share of dq and dk stands for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention import reference
from linclip_kernels.linear_attention.eager import Form

__all__ = ["Launch", "Split", "combine_state", "run", "split_tokens", "sum_state"]

NORM_EPS = tl.constexpr(reference.NORM_EPS)
DENOMINATOR_EPS = tl.constexpr(reference.DENOMINATOR_EPS)
# The interpreter keeps bfloat16 as 16-bit integers, and its dot would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

#: Tokens of one part. The upper bound caps what a single accumulator adds up.
MIN_PART, MAX_PART = 1024, 4096
#: Streaming multiprocessors assumed where there is no CUDA device (the interpreter).
DEFAULT_NUM_SMS = 132


@dataclass(frozen=True)
class Split:
    """How the work on [B, N, H, D], [B, N, H, Dv] is cut into programs."""

    batch: int
    num_tokens: int
    heads: int
    key_dim: int
    value_dim: int
    part: int  # tokens per part, a multiple of block_tokens
    block_tokens: int
    block_key: int
    block_value: int
    num_warps: int

    @property
    def num_parts(self) -> int:
        return triton.cdiv(self.num_tokens, self.part)

    @property
    def num_value_blocks(self) -> int:
        return triton.cdiv(self.value_dim, self.block_value)

    @property
    def state_size(self) -> int:
        key_dim, value_dim = self.key_dim, self.value_dim
        return key_dim * value_dim + value_dim + self.num_value_blocks * key_dim

    @property
    def grid(self) -> tuple[int, int]:
        return self.batch * self.heads * self.num_parts, self.num_value_blocks

    def state_like(self, x: Tensor) -> Tensor:
        shape = (self.num_parts, self.batch * self.heads, self.state_size)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def gradient_like(self, x: Tensor) -> Tensor:
        """Room for dq or dk: [value blocks, B, N, H, D], float32 if there are several to add."""
        shape = (self.num_value_blocks, *x.shape)
        dtype = x.dtype if self.num_value_blocks == 1 else torch.float32
        return torch.empty(shape, dtype=dtype, device=x.device)

    def arguments(self, form: Form) -> dict[str, Any]:
        """The arguments every kernel takes."""
        return {
            "num_tokens": self.num_tokens,
            "num_heads": self.heads,
            "num_parts": self.num_parts,
            "part": self.part,
            "D": self.key_dim,
            "DV": self.value_dim,
            "QK_NORM": form.qk_norm,
            "BLOCK_N": self.block_tokens,
            "BLOCK_D": self.block_key,
            "BLOCK_DV": self.block_value,
        }


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as a value: it can be run, or compiled for another machine."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in their order on the device of their tensors."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            launch.kernel[launch.grid](
                **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
            )


def split_tokens(q: Tensor, v: Tensor, form: Form) -> Split:
    """Choose parts and blocks: enough programs to fill the device, 1024 to 4096 tokens each.

    Blocks are as large as the registers of a program hold: less room for tokens where a masked
    tile stands beside the state, less for everything in float32 (and float16, which is widened).

    Args:
        q: [B, N, H, D].
        v: [B, N, H, Dv].
        form: Which form; only ``causal`` matters.
    """
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    widened = q.dtype != torch.bfloat16
    block_key = max(16, triton.next_power_of_2(key_dim))
    block_value = min(max(16, triton.next_power_of_2(value_dim)), 128, 2**13 // block_key)
    block_tokens = 64
    for tight in (widened, form.causal, block_key > 128):
        block_tokens = max(16, block_tokens // 2) if tight else block_tokens
    num_sms = DEFAULT_NUM_SMS
    if q.device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs_per_part = batch * heads * triton.cdiv(value_dim, block_value)
    wanted_parts = triton.cdiv(4 * num_sms, programs_per_part)
    part = min(max(triton.cdiv(num_tokens, wanted_parts), MIN_PART), MAX_PART)
    return Split(
        batch=batch,
        num_tokens=num_tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        part=triton.cdiv(part, block_tokens) * block_tokens,
        block_tokens=block_tokens,
        block_key=block_key,
        block_value=block_value,
        num_warps=8 if block_key * block_value >= 64 * 64 else 4,
    )


def sum_state(
    x: Tensor, y: Tensor, rows: Tensor | None, state: Tensor, split: Split, form: Form
) -> Launch:
    """Sum every part's state of x-hat and y into ``state``.

    Args:
        x: [B, N, H, D].
        y: [B, N, H, Dv].
        rows: Scale and e of every row, [2, value blocks, B * H, N]; None: ones.
        state: [parts, B * H, state_size].
    """
    arguments = {
        "p_x": x,
        "p_y": y,
        "p_rows": state if rows is None else rows,
        "p_state": state,
        "stride_x": x.stride(),
        "stride_y": y.stride(),
        **split.arguments(form),
        "HAS_ROWS": rows is not None,
    }
    return Launch(_sum_state_kernel, split.grid, arguments, split.num_warps)


def combine_state(state: Tensor, out: Tensor, *, prefix: bool, reverse: bool = False) -> Launch:
    """Add up the parts in their order (or the reverse), with compensation.

    Args:
        state: [parts, B * H, state_size].
        out: prefix: the shape of ``state`` (may be ``state``), gets what lies before every part;
            otherwise [1, B * H, state_size], gets the total.
    """
    size, block = state[0].numel(), 1024
    arguments = {
        "p_state": state,
        "p_out": out,
        "size": size,
        "num_parts": state.shape[0],
        "PREFIX": prefix,
        "REVERSE": reverse,
        "BLOCK": block,
    }
    return Launch(_combine_state_kernel, (triton.cdiv(size, block),), arguments)


@triton.jit
def program_place(num_parts, num_heads, part, num_tokens):
    """Where this program works.

    (part, batch * head, their number B * H, batch, head, first token, end token, value block)
    """
    i_part = tl.program_id(0) % num_parts
    i_bh = (tl.program_id(0) // num_parts).to(tl.int64)
    num_bh = (tl.num_programs(0) // num_parts).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    first = i_part * part
    end = tl.minimum(first + part, num_tokens)
    return i_part, i_bh, num_bh, i_b, i_h, first, end, tl.program_id(1)


@triton.jit
def load_tile(p_x, stride, i_b, i_h, i_n, i_d, num_tokens, DIM: tl.constexpr):
    """Rows i_n, columns i_d of one head; zero outside. float16 is widened, for its short range."""
    o_n = i_n.to(tl.int64)
    p = (
        p_x
        + i_b * stride[0]
        + i_h * stride[2]
        + o_n[:, None] * stride[1]
        + i_d[None, :] * stride[3]
    )
    x = tl.load(p, mask=(i_n < num_tokens)[:, None] & (i_d < DIM)[None, :], other=0.0)
    return x if x.dtype != tl.float16 else x.to(tl.float32)


@triton.jit
def store_tile(p_x, x, i_b, i_h, i_n, i_d, num_tokens, num_heads, DIM: tl.constexpr):
    """The same into a contiguous [B, N, H, DIM]."""
    o_n = (i_b * num_tokens + i_n) * num_heads + i_h
    p = p_x + o_n[:, None] * DIM + i_d[None, :]
    mask = (i_n < num_tokens)[:, None] & (i_d < DIM)[None, :]
    tl.store(p, x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def inverse_norm(x, QK_NORM: tl.constexpr):
    x = x.to(tl.float32)
    if QK_NORM:
        return tl.rsqrt(tl.sum(x * x, axis=1) + NORM_EPS)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit
def inverse_norm_backward(d_x_hat, x, inverse, QK_NORM: tl.constexpr):
    """Gradient with respect to x from the one with respect to x-hat = x * inverse."""
    if QK_NORM:
        x_hat = x.to(tl.float32) * inverse[:, None]
        along = tl.sum(x_hat * d_x_hat, axis=1)
        return (d_x_hat - x_hat * along[:, None]) * inverse[:, None]
    else:
        return d_x_hat


@triton.jit
def inverse_denominator(denominator, num_keys):
    """1 / clamped denominator of Eq. 4, and where the clamp left it free."""
    floor = DENOMINATOR_EPS * num_keys.to(tl.float32)
    return 1.0 / tl.maximum(denominator, floor), denominator >= floor


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands lose no bits that matter, bfloat16 ones none at all."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def dot_state(a, state):
    """a @ state for a float32 state: in bfloat16 the state enters as a high and a low half."""
    if a.dtype == tl.float32:
        return dot(a, state)
    else:
        high = state.to(a.dtype)
        low = (state - high.to(tl.float32)).to(a.dtype)
        return dot(a, high) + dot(a, low)


@triton.jit
def load_state(p_state, i_row, i_d, i_v, D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """S [BLOCK_D, BLOCK_DV], w [BLOCK_DV] and z [BLOCK_D] of one row of the state buffer."""
    num_value_blocks: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    p = p_state + i_row * (D * DV + DV + num_value_blocks * D)
    b_s = tl.load(
        p + i_d[:, None] * DV + i_v[None, :],
        mask=(i_d < D)[:, None] & (i_v < DV)[None, :],
        other=0.0,
    )
    b_w = tl.load(p + D * DV + i_v, mask=i_v < DV, other=0.0)
    b_z = tl.load(p + D * DV + DV + i_d, mask=i_d < D, other=0.0)
    for i in tl.static_range(1, num_value_blocks):
        b_z += tl.load(p + D * DV + DV + i * D + i_d, mask=i_d < D, other=0.0)
    return b_s, b_w, b_z


@triton.jit
def store_state(
    p_state,
    i_row,
    b_s,
    b_w,
    b_z,
    i_d,
    i_v,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Store one value block of the state, z as this block's share."""
    num_value_blocks: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    p = p_state + i_row * (D * DV + DV + num_value_blocks * D)
    mask = (i_d < D)[:, None] & (i_v < DV)[None, :]
    tl.store(p + i_d[:, None] * DV + i_v[None, :], b_s, mask=mask)
    tl.store(p + D * DV + i_v, b_w, mask=i_v < DV)
    tl.store(p + D * DV + DV + tl.program_id(1) * D + i_d, b_z, mask=i_d < D)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_state_kernel(
    p_x,
    p_y,
    p_rows,
    p_state,
    stride_x,
    stride_y,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    i_part, i_bh, num_bh, i_b, i_h, first, end, i_block = program_place(
        num_parts, num_heads, part, num_tokens
    )
    i_d = tl.arange(0, BLOCK_D)
    i_v = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_s = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    b_w = tl.zeros([BLOCK_DV], tl.float32)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_x = load_tile(p_x, stride_x, i_b, i_h, i_n, i_d, num_tokens, D)  # [BLOCK_N, BLOCK_D]
        b_y = load_tile(p_y, stride_y, i_b, i_h, i_n, i_v, num_tokens, DV)  # [BLOCK_N, BLOCK_DV]
        b_x_hat = b_x.to(tl.float32) * inverse_norm(b_x, QK_NORM)[:, None]
        if HAS_ROWS:
            b_scale, b_e = load_rows(p_rows, i_block, i_bh, num_bh, i_n, num_tokens)
            b_w += tl.sum(b_y.to(tl.float32) * b_scale[:, None], axis=0)
            b_z += tl.sum(b_x_hat * b_e[:, None], axis=0)
            b_x_hat *= b_scale[:, None]
        else:
            b_w += tl.sum(b_y.to(tl.float32), axis=0)
            b_z += tl.sum(b_x_hat, axis=0)
        b_s += dot(tl.trans(b_x_hat.to(b_y.dtype)), b_y)
    if not HAS_ROWS:
        b_z = tl.where(i_block == 0, b_z, 0.0)  # every value block has summed the same z
    store_state(p_state, i_part * num_bh + i_bh, b_s, b_w, b_z, i_d, i_v, D, DV, BLOCK_DV)


@triton.jit
def load_rows(p_rows, i_block, i_bh, num_bh, i_n, num_tokens):
    """Scale and e of the rows i_n for one value block, from [2, value blocks, B * H, N]."""
    p = p_rows + (i_block * num_bh + i_bh) * num_tokens + i_n
    o_e = tl.num_programs(1) * num_bh * num_tokens
    mask = i_n < num_tokens
    return tl.load(p, mask=mask, other=0.0), tl.load(p + o_e, mask=mask, other=0.0)


@triton.jit
def store_rows(p_rows, b_scale, b_e, i_block, i_bh, num_bh, i_n, num_tokens):
    p = p_rows + (i_block * num_bh + i_bh) * num_tokens + i_n
    o_e = tl.num_programs(1) * num_bh * num_tokens
    tl.store(p, b_scale, mask=i_n < num_tokens)
    tl.store(p + o_e, b_e, mask=i_n < num_tokens)


@triton.jit
def _combine_state_kernel(
    p_state,
    p_out,
    size,
    num_parts,
    PREFIX: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)  # what rounding has taken from total
    for step in range(num_parts):
        i_part = num_parts - 1 - step if REVERSE else step
        o_part = i_part * size.to(tl.int64) + i
        b_state = tl.load(p_state + o_part, mask=mask, other=0.0)
        if PREFIX:
            tl.store(p_out + o_part, total, mask=mask)
        share = b_state - lost
        grown = total + share
        lost = (grown - total) - share
        total = grown
    if not PREFIX:
        tl.store(p_out + i, total, mask=mask)

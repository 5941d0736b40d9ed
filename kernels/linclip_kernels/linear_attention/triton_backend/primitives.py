# mypy: allow-untyped-defs
# ruff: noqa: RET505 (Triton needs the else where a branch is chosen at compile time)
"""The parts that bidirectional and causal Triton kernels share: tiles, features, states.

A state is the float32 matrix [D + 1, DV + 1] of the public operator: its first row is w and the
number of keys, its other rows are S and z. A program works on one head and one part of the tokens
of one sequence; tokens are counted from the beginning of the sequence.

A kernel takes a tensor as a View and its compile-time constants as one Meta. Sums start from
tl.full(..., 0.0, ...), because tl.zeros does not accept fields of a named tuple as sizes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention import variant
from linclip_kernels.linear_attention.triton_backend.partition import Call, Launch, Partition

__all__ = ["combine_states", "sum_states", "views"]

NORM_EPS = tl.constexpr(variant.NORM_EPS)
DENOMINATOR_EPS = tl.constexpr(variant.DENOMINATOR_EPS)
# The interpreter keeps bfloat16 as 16-bit integers, and its dot would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: Arguments whose value must not lead to another compilation. Triton does not look for them inside
#: tuples, so that they are plain arguments.
LENGTHS = ["num_tokens", "num_parts", "part"]


class View(NamedTuple):
    """A tensor [B, N, H, *] as kernels take it, or one head of it after :func:`at_head`."""

    p: Any
    strides: Any


class Place(NamedTuple):
    """The place of a program in the problem."""

    i_part: Any  # part, numbered over all sequences
    i_s: Any  # sequence
    i_b: Any  # batch entry
    i_h: Any  # head
    offset: Any  # first token of the sequence in the batch entry
    length: Any  # tokens of the sequence
    first: Any  # first token of the part
    end: Any  # end of the part
    num_tokens: Any  # of the batch entry
    num_heads: Any


def views(**tensors: Tensor | None) -> dict[str, View | None]:
    """Return kernel arguments: the tensors, each with its strides."""
    return {name: None if x is None else View(x, x.stride()) for name, x in tensors.items()}


def sum_states(call: Call, states: Tensor) -> Launch:
    """Return the launch that sums every part's state of its keys into ``states``.

    Args:
        call: The inputs, of which k and v are read.
        states: [parts, H, D + 1, Dv + 1].
    """
    tensors = views(k=call.k, v=call.v) | {"p_states": states, "META": call.partition.meta}
    # With norms, one program of tiles of 128 fills a multiprocessor: its loads must run ahead.
    partition = call.partition
    num_stages = 3 if partition.variant.qk_norm and partition.block_tokens == 128 else 2
    return partition.launch(_sum_states_kernel, tensors, num_stages)


def combine_states(
    parts: Tensor,
    partition: Partition,
    *,
    start: Tensor | None,
    before: Tensor | None = None,
    total: Tensor | None = None,
    reverse: bool = False,
) -> Launch:
    """Return the launch that adds up the states of every sequence's parts, with compensation.

    Args:
        parts: [parts, H, D + 1, Dv + 1].
        partition: The programs, which tell the sequence of a part.
        start: [S, H, D + 1, Dv + 1], added first.
        before: Receives the sum of all that comes before each part; may be ``parts``.
        total: Receives the sum of all, [S, H, D + 1, Dv + 1].
        reverse: Add the parts from the last to the first.
    """
    size, block = parts[0, 0].numel(), 256
    arguments = {
        "p_parts": parts,
        "p_first_parts": partition.first_parts,
        "p_start": start,
        "p_before": before,
        "p_total": total,
        "size": size,
        "num_heads": partition.heads,
        "num_parts": partition.parts_of_sequences[0],
        "REVERSE": reverse,
        "BLOCK": block,
    }
    grid = partition.num_sequences * partition.heads, triton.cdiv(size, block)
    return Launch(_combine_states_kernel, grid, arguments)


@triton.jit
def program_place(schedule, num_tokens, num_parts, part):
    """Return where this program works, as a Place."""
    num_heads = schedule.num_heads
    i_part = (tl.program_id(0) // num_heads).to(tl.int64)
    i_h = (tl.program_id(0) % num_heads).to(tl.int64)
    if schedule.p_table is None:
        i_s = i_part // num_parts
        i_b, offset, length = i_s, i_s * 0, num_tokens
        first = (i_part % num_parts).to(tl.int32) * part
    else:
        p = schedule.p_table + i_part * 4
        i_s, offset, length = tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int32)
        i_b, first = i_s * 0, tl.load(p + 3).to(tl.int32)
    return Place(
        i_part=i_part,
        i_s=i_s,
        i_b=i_b,
        i_h=i_h,
        offset=offset,
        length=length,
        first=first,
        end=tl.minimum(first + part, length),
        num_tokens=num_tokens,
        num_heads=num_heads,
    )


@triton.jit
def at_head(x, place):
    """Return the View of the program's sequence and head."""
    s = x.strides
    return View(x.p + place.i_b * s[0] + place.offset * s[1] + place.i_h * s[2], s)


@triton.jit
def load_tile(x, i_n, end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows i_n of one head, zeros from ``end`` on. float16 is widened, for its short range."""
    i_d = tl.arange(0, BLOCK)
    p = x.p + i_n.to(tl.int64)[:, None] * x.strides[1] + i_d.to(tl.int64)[None, :] * x.strides[3]
    b_x = tl.load(p, mask=(i_n < end)[:, None] & (i_d < DIM)[None, :], other=0.0)
    return b_x if b_x.dtype != tl.float16 else b_x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to dtype; the interpreter alone would cut bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_tile(
    x, b_x, start, end, DIM: tl.constexpr, BLOCK: tl.constexpr, RECOMPUTE: tl.constexpr = False
):
    """Store rows from ``start`` on of one head, before ``end``.

    Their numbers are written differently from those of a loaded tile: if the compiler saw that they
    are equal, a loop that loads ahead would keep those of all tiles under way in registers.

    Args:
        RECOMPUTE: Whether to compute all addresses again instead of keeping offsets in registers.
    """
    i_n, i_d = tl.arange(0, b_x.shape[0]), tl.arange(0, BLOCK)
    if RECOMPUTE:
        i_n = (start - 1) + (i_n + 1)
        rows, inside = x.p + i_n.to(tl.int64) * x.strides[1], i_n < end
    else:
        rows = x.p + tl.cast(start, tl.int64) * x.strides[1] + i_n.to(tl.int64) * x.strides[1]
        inside = i_n < end - start
    p = rows[:, None] + i_d.to(tl.int64)[None, :] * x.strides[3]
    mask = inside[:, None] & (i_d < DIM)[None, :]
    tl.store(p, narrow(b_x, x.p.dtype.element_ty), mask=mask)


@triton.jit
def features(b_x, i_n, end, META: tl.constexpr):
    """Return a, factor and the inverse norm of x, with phi(x-hat) = a * factor[:, None].

    a has the dtype of x: x and its positive part enter the dot products unrounded, and are scaled
    afterwards.
    """
    x = b_x.to(tl.float32)
    inverse = tl.full([x.shape[0]], 1.0, tl.float32)
    if META.QK_NORM:
        square = tl.sum(x * x, axis=1)
        # 0 * infinity is NaN: a row whose |x|^2 overflows is not scaled to zero.
        inverse = tl.rsqrt(square + (0.0 * square + NORM_EPS))
    if META.FEATURE_MAP == "relu":
        return narrow(tl.where(x < 0, 0.0, x), b_x.dtype), inverse, inverse
    elif META.FEATURE_MAP == "softplus":
        i_d = tl.arange(0, META.BLOCK_D)
        inside = (i_n < end)[:, None] & (i_d < META.D)[None, :]
        x = x * inverse[:, None]
        small = tl.exp(-tl.abs(x))
        grown = 1.0 + small
        # log(1 + small) with all its digits, also where grown has none of small's.
        rest = tl.where(grown == 1.0, small, tl.log(grown) * small / (grown - 1.0))
        phi = tl.where(x < 0, 0.0, x) + rest
        return narrow(tl.where(inside, phi, 0.0), b_x.dtype), inverse * 0.0 + 1.0, inverse
    else:
        return b_x, inverse, inverse


@triton.jit
def scaled_features(b_a, factor, META: tl.constexpr):
    """Return phi(x-hat) in the dtype of x, of what :func:`features` returns."""
    if META.QK_NORM:
        return narrow(b_a.to(tl.float32) * factor[:, None], b_a.dtype)
    else:
        return b_a


@triton.jit
def features_backward(b_dphi, b_x, inverse, along, scale, META: tl.constexpr):
    """Return the gradient of x from that of phi(x-hat), which is ``b_dphi`` times ``scale``.

    ``along`` is x.b_dphi, which is used with the norm and where phi is linear.
    """
    x = b_x.to(tl.float32)
    if META.FEATURE_MAP == "relu":
        b_dphi = tl.where(x > 0, b_dphi, 0.0 * x)
        along = tl.sum(x * b_dphi, axis=1)
    elif META.FEATURE_MAP == "softplus":
        b_dphi = b_dphi / (1.0 + tl.exp(-x * inverse[:, None]))
        along = tl.sum(x * b_dphi, axis=1)
    if META.QK_NORM:
        along *= inverse * inverse
        scale *= inverse
        return b_dphi * scale[:, None] - x * (along * scale)[:, None]
    else:
        return b_dphi * (inverse * scale)[:, None]


@triton.jit
def dot(a, b, META: tl.constexpr):
    """a @ b in float32; float32 operands lose no bits that matter, bfloat16 ones none at all."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision=META.FP32_DOT)
    else:
        return tl.dot(a, b)


@triton.jit
def halves(state, dtype: tl.constexpr):
    """Return a float32 state as two halves of bfloat16; otherwise itself, twice."""
    if dtype == tl.bfloat16:
        high = narrow(state, dtype)
        return high, narrow(state - high.to(tl.float32), dtype)
    else:
        return state, state


@triton.jit
def dot_halves(a, high, low, META: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """a @ state, or its transpose, for the two halves of the state."""
    product = dot(a, tl.trans(high) if TRANSPOSED else high, META)
    if a.dtype == tl.bfloat16:
        product += dot(a, tl.trans(low) if TRANSPOSED else low, META)
    return product


@triton.jit
def place_parts(x, i, dtype: tl.constexpr):
    """Return a float32 vector [D] as [D, columns] of dtype: part i of x in every column, where the
    parts 0 to 2 add up to x and all others are zero."""
    i = i[None, :]
    if dtype == tl.bfloat16:
        high = narrow(x, dtype).to(tl.float32)
        middle = narrow(x - high, dtype).to(tl.float32)
        low = tl.where(i == 2, (x - high - middle)[:, None], 0.0)
        rest = tl.where(i == 1, middle[:, None], low)
        return narrow(tl.where(i == 0, high[:, None], rest), dtype)
    else:
        return tl.where(i == 0, x[:, None], 0.0)


@triton.jit
def as_columns(x, dtype: tl.constexpr, META: tl.constexpr):
    """Return a float32 vector [D] as [D, COLUMNS] of dtype whose columns add up to it.

    A product with it is a row-wise product with the vector that the matrix unit computes.
    """
    return place_parts(x, tl.arange(0, META.COLUMNS), dtype)


@triton.jit
def column_sums(b_x, b_factor, META: tl.constexpr):
    """Return [D, COLUMNS] whose columns add up to the sum over rows of b_x * b_factor[:, None];
    without a factor that of b_x. The matrix unit computes it, from the tile in shared memory."""
    if b_factor is None:
        b_ones = tl.full([b_x.shape[0], META.COLUMNS], 1.0 / META.COLUMNS, tl.float32)
        return dot(tl.trans(b_x), narrow(b_ones, b_x.dtype), META)
    else:
        return dot(tl.trans(b_x), as_columns(b_factor, b_x.dtype, META), META)


@triton.jit
def outer(x, y, dtype: tl.constexpr, META: tl.constexpr):
    """Return the outer product of two float32 vectors, computed by the matrix unit so that the
    layout of its products takes no registers for y.

    Each of the three parts of x meets each of those of y in one of 16 columns.
    """
    i = tl.arange(0, 16)
    return dot(place_parts(x, i % 3, dtype), tl.trans(place_parts(y, i // 3, dtype)), META)


@triton.jit
def load_state(p_states, i, place, META: tl.constexpr):
    """Return S [BLOCK_D, BLOCK_DV], w [BLOCK_DV], z [BLOCK_D] and the number of keys.

    i is the number of a sequence or a part, whichever the states are of.
    """
    i_d, i_v = tl.arange(0, META.BLOCK_D), tl.arange(0, META.BLOCK_DV)
    p = p_states + (i * place.num_heads + place.i_h) * (META.D + 1) * (META.DV + 1)
    p_rows = p + (i_d + 1) * (META.DV + 1)
    inside = (i_d < META.D)[:, None] & (i_v < META.DV)[None, :]
    b_s = tl.load(p_rows[:, None] + i_v[None, :], mask=inside, other=0.0)
    b_w = tl.load(p + i_v, mask=i_v < META.DV, other=0.0)
    b_z = tl.load(p_rows + META.DV, mask=i_d < META.D, other=0.0)
    return b_s, b_w, b_z, tl.load(p + META.DV)


@triton.jit
def store_state(p_states, i, place, b_s, b_w, b_z, num_keys, META: tl.constexpr):
    i_d, i_v = tl.arange(0, META.BLOCK_D), tl.arange(0, META.BLOCK_DV)
    p = p_states + (i * place.num_heads + place.i_h) * (META.D + 1) * (META.DV + 1)
    p_rows = p + (i_d + 1) * (META.DV + 1)
    inside = (i_d < META.D)[:, None] & (i_v < META.DV)[None, :]
    tl.store(p_rows[:, None] + i_v[None, :], b_s, mask=inside)
    tl.store(p + i_v, b_w, mask=i_v < META.DV)
    tl.store(p_rows + META.DV, b_z, mask=i_d < META.D)
    tl.store(p + META.DV, num_keys)


@triton.jit
def sum_tokens(k, v, place, META: tl.constexpr):
    """Return S, w and z of the part's tokens of one head."""
    b_s = tl.full([META.BLOCK_D, META.BLOCK_DV], 0.0, tl.float32)
    b_ws = tl.full([META.BLOCK_DV, META.COLUMNS], 0.0, tl.float32)
    b_zs = tl.full([META.BLOCK_D, META.COLUMNS], 0.0, tl.float32)
    for start in range(place.first, place.end, META.BLOCK_N):
        i_n = start + tl.arange(0, META.BLOCK_N)
        b_k = load_tile(k, i_n, place.end, META.D, META.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v, i_n, place.end, META.DV, META.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, _inverse = features(b_k, i_n, place.end, META)
        b_ws += column_sums(b_v, None, META)
        if META.QK_NORM:
            b_zs += column_sums(b_a, b_factor, META)
            b_v = narrow(b_v.to(tl.float32) * b_factor[:, None], b_v.dtype)
        else:
            b_zs += column_sums(b_a, None, META)
        b_s += dot(tl.trans(b_a), b_v, META)
    return b_s, tl.sum(b_ws, axis=1), tl.sum(b_zs, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def _sum_states_kernel(k, v, p_states, schedule, num_tokens, num_parts, part, META: tl.constexpr):
    place = program_place(schedule, num_tokens, num_parts, part)
    b_s, b_w, b_z = sum_tokens(at_head(k, place), at_head(v, place), place, META)
    num_keys = (place.end - place.first).to(tl.float32)
    store_state(p_states, place.i_part, place, b_s, b_w, b_z, num_keys, META)


@triton.jit(do_not_specialize=["num_parts"])
def _combine_states_kernel(
    p_parts,
    p_first_parts,
    p_start,
    p_before,
    p_total,
    size,
    num_heads,
    num_parts,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_s = (tl.program_id(0) // num_heads).to(tl.int64)
    i_h = tl.program_id(0) % num_heads
    i_state = tl.program_id(0).to(tl.int64) * size
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if p_first_parts is None:
        first, count = i_s * num_parts, num_parts
    else:
        first = tl.load(p_first_parts + i_s)
        count = (tl.load(p_first_parts + i_s + 1) - first).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    if p_start is not None:
        total = tl.load(p_start + i_state + i, mask=i < size, other=0.0)
    lost = tl.zeros([BLOCK], tl.float32)  # what rounding has taken from total
    # Loads run ahead; where `before` is `parts`, a state is read before its place is written.
    for step in tl.range(count, num_stages=4):
        i_part = first + (count - 1 - step if REVERSE else step)
        o_part = (i_part * num_heads + i_h) * size + i
        b_part = tl.load(p_parts + o_part, mask=i < size, other=0.0)
        if p_before is not None:
            tl.store(p_before + o_part, total, mask=i < size)
        share = b_part - lost
        grown = total + share
        lost = (grown - total) - share
        total = grown
    if p_total is not None:
        tl.store(p_total + i_state + i, total, mask=i < size)

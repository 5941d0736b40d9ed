# mypy: allow-untyped-defs
# ruff: noqa: RET505 (Triton needs the else where a branch is chosen at compile time)
"""What the bidirectional and the causal Triton kernels share: tiles, features, states.

A state is the float32 matrix [D + 1, DV + 1] of the public operator: w in its first row, the number
of keys behind it, S below w and z behind S. A program works on one head and one part of the tokens
of one sequence; tokens are counted from the beginning of the sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from linclip_kernels.linear_attention import variant as forms
from linclip_kernels.linear_attention.triton_backend.partition import Launch, Split
from linclip_kernels.linear_attention.variant import Form

__all__ = ["combine_states", "sum_states"]

NORM_EPS = tl.constexpr(forms.NORM_EPS)
DENOMINATOR_EPS = tl.constexpr(forms.DENOMINATOR_EPS)
# The interpreter keeps bfloat16 as 16-bit integers, and its dot would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: Arguments whose value must not lead to another compilation.
LENGTHS = ["num_tokens", "num_parts", "part"]


def sum_states(
    x: Tensor, y: Tensor, rows: Tensor | None, states: Tensor, split: Split, form: Form
) -> Launch:
    """Sum every part's state of phi(x) and y into ``states``.

    Args:
        x: [B, N, H, D].
        y: [B, N, H, Dv].
        rows: Scale and e of every row, [B, H, 2, N]; None: ones.
        states: [parts, H, D + 1, Dv + 1].
    """
    arguments = {
        "p_x": x,
        "p_y": y,
        "p_rows": rows,
        "p_states": states,
        "stride_x": x.stride(),
        "stride_y": y.stride(),
        **split.arguments,
        "QK_NORM": form.qk_norm,
        "FEATURE_MAP": form.feature_map,
        "HAS_CONSTANT": form.has_constant,
    }
    return Launch(_sum_states_kernel, split.grid, arguments, split.num_warps)


def combine_states(
    parts: Tensor,
    split: Split,
    *,
    start: Tensor | None,
    before: Tensor | None = None,
    total: Tensor | None = None,
    reverse: bool = False,
) -> Launch:
    """Add up the states of every sequence's parts in their order (or the reverse), compensated.

    Args:
        parts: [parts, H, D + 1, Dv + 1].
        start: [S, H, D + 1, Dv + 1], added in front.
        before: Gets what lies before every part; may be ``parts``.
        total: Gets the sum, [S, H, D + 1, Dv + 1].
    """
    size, block = parts[0, 0].numel(), 256
    arguments = {
        "p_parts": parts,
        "p_first_parts": split.first_parts,
        "p_start": start,
        "p_before": before,
        "p_total": total,
        "size": size,
        "num_heads": split.heads,
        "num_parts": split.parts_of_sequences[0],
        "REVERSE": reverse,
        "BLOCK": block,
    }
    grid = split.num_sequences * split.heads, triton.cdiv(size, block)
    return Launch(_combine_states_kernel, grid, arguments)


@triton.jit
def program_place(p_table, num_tokens, num_heads, num_parts, part):
    """Where this program works.

    (part, sequence, head, batch, first token of the sequence in the batch, its length, first token
    and end of the part)
    """
    i_part = (tl.program_id(0) // num_heads).to(tl.int64)
    i_h = (tl.program_id(0) % num_heads).to(tl.int64)
    if p_table is None:
        i_s = i_part // num_parts
        first = (i_part % num_parts).to(tl.int32) * part
        end = tl.minimum(first + part, num_tokens)
        return i_part, i_s, i_h, i_s, i_s * 0, num_tokens, first, end
    else:
        i_s, offset = tl.load(p_table + i_part * 4), tl.load(p_table + i_part * 4 + 1)
        length = tl.load(p_table + i_part * 4 + 2).to(tl.int32)
        first = tl.load(p_table + i_part * 4 + 3).to(tl.int32)
        return i_part, i_s, i_h, i_s * 0, offset, length, first, tl.minimum(first + part, length)


@triton.jit
def at_head(p_x, stride, i_b, i_h, offset):
    return p_x + i_b * stride[0] + offset * stride[1] + i_h * stride[2]


@triton.jit
def load_tile(p_x, stride, i_n, i_d, length, DIM: tl.constexpr):
    """Rows i_n, columns i_d of one head; zero outside. float16 is widened, for its short range."""
    p = p_x + i_n.to(tl.int64)[:, None] * stride[1] + i_d.to(tl.int64)[None, :] * stride[3]
    x = tl.load(p, mask=(i_n < length)[:, None] & (i_d < DIM)[None, :], other=0.0)
    return x if x.dtype != tl.float16 else x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to dtype; the interpreter alone would cut bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_tile(p_x, stride, x, i_n, i_d, length, DIM: tl.constexpr):
    p = p_x + i_n.to(tl.int64)[:, None] * stride[1] + i_d.to(tl.int64)[None, :] * stride[3]
    mask = (i_n < length)[:, None] & (i_d < DIM)[None, :]
    tl.store(p, narrow(x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def features(
    b_x, i_n, i_d, length, D: tl.constexpr, QK_NORM: tl.constexpr, FEATURE_MAP: tl.constexpr
):
    """phi(x-hat) = a * factor[:, None] with a in the dtype of x, and the inverse norm of x.

    x and its positive part enter the dot products unrounded, and are scaled afterwards.
    """
    x = b_x.to(tl.float32)
    inverse = tl.full([x.shape[0]], 1.0, tl.float32)
    if QK_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) + NORM_EPS)
    if FEATURE_MAP == "relu":
        return narrow(tl.where(x < 0, 0.0, x), b_x.dtype), inverse, inverse
    elif FEATURE_MAP == "softplus":
        inside = (i_n < length)[:, None] & (i_d < D)[None, :]
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
def features_backward(b_dphi, b_x, inverse, QK_NORM: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """Gradient of x from that of phi(x-hat)."""
    x = b_x.to(tl.float32)
    if FEATURE_MAP == "relu":
        b_dphi = tl.where(x > 0, b_dphi, 0.0 * x)
    elif FEATURE_MAP == "softplus":
        b_dphi = b_dphi / (1.0 + tl.exp(-x * inverse[:, None]))
    if QK_NORM:
        along = tl.sum(x * b_dphi, axis=1) * inverse * inverse
        return (b_dphi - x * along[:, None]) * inverse[:, None]
    else:
        return b_dphi


@triton.jit
def row_scale(b_denominator, b_num_keys, p_factor, i_n, length, scale, NORMALIZED: tl.constexpr):
    """Factor of every row's numerator, and where no clamp holds its denominator."""
    if NORMALIZED:
        floor = DENOMINATOR_EPS * b_num_keys
        return 1.0 / tl.maximum(b_denominator, floor), b_denominator >= floor
    elif p_factor is not None:
        return scale * tl.load(p_factor + i_n, mask=i_n < length, other=0.0), i_n >= 0
    else:
        return b_denominator * 0.0 + scale, i_n >= 0


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
        high = narrow(state, a.dtype)
        low = narrow(state - high.to(tl.float32), a.dtype)
        return dot(a, high) + dot(a, low)


@triton.jit
def fold_rows(x, ROWS: tl.constexpr):
    """[BLOCK_N, *] -> sums of every ROWS-th row [ROWS, *], added up where the rows already lie."""
    if x.shape[0] <= ROWS:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1]]), axis=0)


@triton.jit
def load_state(p_state, i_row, i_d, i_v, D: tl.constexpr, DV: tl.constexpr):
    """S [BLOCK_D, BLOCK_DV], w [BLOCK_DV], z [BLOCK_D] and the number of keys."""
    p = p_state + i_row * (D + 1) * (DV + 1)
    p_rows = p + (i_d + 1) * (DV + 1)
    inside = (i_d < D)[:, None] & (i_v < DV)[None, :]
    b_s = tl.load(p_rows[:, None] + i_v[None, :], mask=inside, other=0.0)
    b_w = tl.load(p + i_v, mask=i_v < DV, other=0.0)
    b_z = tl.load(p_rows + DV, mask=i_d < D, other=0.0)
    return b_s, b_w, b_z, tl.load(p + DV)


@triton.jit
def store_state(
    p_state, i_row, b_s, b_w, b_z, num_keys, i_d, i_v, D: tl.constexpr, DV: tl.constexpr
):
    p = p_state + i_row * (D + 1) * (DV + 1)
    p_rows = p + (i_d + 1) * (DV + 1)
    inside = (i_d < D)[:, None] & (i_v < DV)[None, :]
    tl.store(p_rows[:, None] + i_v[None, :], b_s, mask=inside)
    tl.store(p + i_v, b_w, mask=i_v < DV)
    tl.store(p_rows + DV, b_z, mask=i_d < D)
    tl.store(p + DV, num_keys)


@triton.jit
def sum_tokens(
    p_x,
    p_y,
    p_rows,
    stride_x,
    stride_y,
    num_tokens,
    first,
    end,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS_D: tl.constexpr,
    ROWS_DV: tl.constexpr,
):
    """The state of tokens first to end of one head."""
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_s = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    b_ws, b_zs = tl.zeros([ROWS_DV, BLOCK_DV], tl.float32), tl.zeros([ROWS_D, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        b_x = load_tile(p_x, stride_x, i_n, i_d, length, D)  # [BLOCK_N, BLOCK_D]
        b_y = load_tile(p_y, stride_y, i_n, i_v, length, DV)  # [BLOCK_N, BLOCK_DV]
        b_a, b_factor, _inverse = features(b_x, i_n, i_d, length, D, QK_NORM, FEATURE_MAP)
        b_phi = b_a.to(tl.float32) * b_factor[:, None]
        if p_rows is None:
            b_ws += fold_rows(b_y.to(tl.float32), ROWS_DV)
            b_zs += fold_rows(b_phi, ROWS_D)
        else:
            b_scale, b_e = load_rows(p_rows, num_tokens, i_n, length)
            if HAS_CONSTANT:
                b_ws += fold_rows(b_y.to(tl.float32) * b_scale[:, None], ROWS_DV)
            b_zs += fold_rows(b_phi * b_e[:, None], ROWS_D)
            b_phi *= b_scale[:, None]
        b_s += dot(tl.trans(narrow(b_phi, b_y.dtype)), b_y)
    b_w, b_z = tl.sum(b_ws, axis=0), tl.sum(b_zs, axis=0)
    return b_s, b_w, b_z


@triton.jit(do_not_specialize=LENGTHS)
def _sum_states_kernel(
    p_x,
    p_y,
    p_rows,
    p_states,
    p_table,
    stride_x,
    stride_y,
    num_tokens,
    num_heads,
    num_parts,
    part,
    D: tl.constexpr,
    DV: tl.constexpr,
    QK_NORM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS_D: tl.constexpr,
    ROWS_DV: tl.constexpr,
):
    i_part, _i_s, i_h, i_b, offset, length, first, end = program_place(
        p_table, num_tokens, num_heads, num_parts, part
    )
    p_x, p_y = at_head(p_x, stride_x, i_b, i_h, offset), at_head(p_y, stride_y, i_b, i_h, offset)
    if p_rows is not None:
        p_rows = rows_at_head(p_rows, i_b, i_h, offset, num_tokens, num_heads)
    b_s, b_w, b_z = sum_tokens(
        p_x,
        p_y,
        p_rows,
        stride_x,
        stride_y,
        num_tokens,
        first,
        end,
        length,
        D,
        DV,
        QK_NORM,
        FEATURE_MAP,
        HAS_CONSTANT,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        ROWS_D,
        ROWS_DV,
    )
    i_d, i_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    num_keys = (end - first).to(tl.float32)
    store_state(p_states, i_part * num_heads + i_h, b_s, b_w, b_z, num_keys, i_d, i_v, D, DV)


@triton.jit
def rows_at_head(p_rows, i_b, i_h, offset, num_tokens, num_heads):
    return p_rows + (i_b * num_heads + i_h) * 2 * num_tokens + offset


@triton.jit
def load_rows(p_rows, num_tokens, i_n, length):
    """Scale and e of the rows i_n."""
    scale = tl.load(p_rows + i_n, mask=i_n < length, other=0.0)
    return scale, tl.load(p_rows + num_tokens + i_n, mask=i_n < length, other=0.0)


@triton.jit
def store_rows(p_rows, num_tokens, b_scale, b_e, i_n, length):
    tl.store(p_rows + i_n, b_scale, mask=i_n < length)
    tl.store(p_rows + num_tokens + i_n, b_e, mask=i_n < length)


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

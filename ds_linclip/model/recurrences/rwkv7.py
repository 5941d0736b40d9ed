"""The recurrence of RWKV-7: a state that a diagonal matrix plus one of rank one multiplies."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ds_linclip.model.recurrences.chunks import Chunks, check, scan, without_autocast

__all__ = ["dplr"]

Side = Literal["right", "paper"]


def dplr(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    side: Side = "right",
    chunk_size: int = 32,
) -> Tensor:
    """Compute the causal recurrence with a diagonal plus low rank (DPLR) transition.

    Every head has a state S [Dv, Dk], zero at first. With G = diag(exp(log_w)) + a b^T, a token
    does ``S = S G + v k^T``, and its output is ``S r``. RWKV-7 takes a = -kappa and b = eta kappa
    with unit kappa and eta in [0, 1]: for a key in kappa's direction the old value is replaced.

    The work is done in float32, or in float64 where an argument has it, also under autocast. A
    finite change of a token changes no bit of the outputs before it; inf and nan reach their whole
    chunk. Memory grows with N alone, as for :func:`gated_delta_rule`.

    **Bound.** Over a chunk, the sum of log_w must stay above -80 in every channel (-700 in
    float64), because exp of its negative is a factor by itself. RWKV-7 has log_w > -0.61: 32 tokens
    reach -19.4. Down to -80 the error in float32 stays below 1e-5 of the RMS, also of gradients;
    beyond it the result is inf or nan, and a smaller chunk helps.

    Args:
        r, k: [B, N, H, Dk].
        v: [B, N, H, Dv].
        log_w, a, b: [B, N, H, Dk], or [B, N, H, Dv] with ``side="paper"``; log_w at most 0.
        side: "paper" does ``S = G S + v k^T``, as FRWKV's released code: G acts on values, so that
            a repeated key is not overwritten.
        chunk_size: Greatest number of tokens in a chunk. It changes rounding and time only.

    Returns:
        [B, N, H, Dv] in the dtype of v.

    Raises:
        ValueError: Shapes do not match, or the side is not known.

    Source: arXiv 2503.14456 (RWKV-7); arXiv 2512.07539 (FRWKV).
    """
    if side not in get_args(Side):
        raise ValueError(f"side ({side!r}) must be one of {', '.join(get_args(Side))}")
    transition = {"log_w": log_w, "a": a, "b": b}
    like_k = {"r": r} | (transition if side == "right" else {})
    like_v = transition if side == "paper" else {}
    dtype = check(chunk_size, k, v, like_k=like_k, like_v=like_v, gates={})
    chunks, heads, out_dtype = Chunks(r.shape[1], chunk_size), r.shape[2], v.dtype
    with without_autocast(r.device):
        r, k, v, log_w, a, b = (chunks.split(x, dtype) for x in (r, k, v, log_w, a, b))
        o = (_right if side == "right" else _paper)(chunks.num, r, k, v, log_w, a, b)
        return chunks.join(o, heads).to(out_dtype)


def _right(
    num_chunks: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Read the transposed state by its rows, the keys."""
    total, states, rows, columns = _chunked(num_chunks, k, v, log_w, inner=a, outer=b)
    r = r * total.exp()
    scores = _lower(r @ rows.mT)  # [M, C, 2 C]
    return torch.baddbmm(scores @ columns, r, states)


def _paper(
    num_chunks: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Read the state by its columns, the keys; its rows, which decay, are the values."""
    total, states, rows, columns = _chunked(num_chunks, v, k, log_w, inner=b, outer=a)
    scores = _lower(r @ columns.mT)  # [M, C, 2 C]
    return total.exp() * torch.baddbmm(scores @ rows, r, states.mT)


def _chunked(
    num_chunks: int, row: Tensor, column: Tensor, log_w: Tensor, *, inner: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``P = (diag(w) + outer inner^T) P + row column^T`` over the tokens of all chunks.

    With ``u = P^T inner`` of the state before a token, which obeys a triangular system, a token
    adds ``outer u^T + row column^T``, and c, the sum of log_w from the chunk's start, says how much
    of that is left later: exp(c_i - c_j), here exp(c_i) times exp(-c_j). Any start of the sum but
    the first token would let the rounding of a row depend on tokens after it.

    Args:
        num_chunks: Number of chunks of a head; M = B * H * num_chunks.
        row, log_w, inner, outer: [M, C, P].
        column: [M, C, Q].

    Returns:
        c [M, C, P]; the states before each chunk, [M, P, Q]; the rows (outer, row) exp(-c),
        [M, 2 C, P]; the columns (u, column), [M, 2 C, Q].
    """
    length = row.shape[1]
    total = log_w.cumsum(1)
    grown = (-total).exp()
    rows = torch.cat([outer * grown, row * grown], 1)
    read = inner * (total - log_w).exp()
    by_u, by_column = (read @ rows.mT).split(length, -1)  # [M, C, C] each
    # The solve takes the diagonal as ones and reads nothing above it.
    solved = torch.linalg.solve_triangular(
        -by_u,
        torch.cat([by_column.tril(-1) @ column, read], -1),
        upper=False,
        unitriangular=True,
    )
    u, read = solved.split([column.shape[-1], row.shape[-1]], -1)
    last = total[:, -1:]
    left = (last - total).exp()
    states, u = scan(
        num_chunks,
        decay=last.exp().mT,
        read=read,
        write=(outer * left).mT,
        value=u,
        added=(row * left).mT @ column,
    )
    return total, states, rows, torch.cat([u, column], 1)


def _lower(scores: Tensor) -> Tensor:
    """Keep what the tokens of a chunk may see of themselves and earlier ones, in both halves."""
    length = scores.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later.repeat(1, 2), 0)

"""The gated delta rule: a state that decays, and where a key overwrites the value it had."""

from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor

from ds_linclip.model.recurrences.chunks import Chunks, check, scan, without_autocast

__all__ = ["gated_delta_rule"]

Backend = Literal["torch", "fla"]
FLA_CHUNK_SIZES = (16, 32, 64)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int = 64,
    backend: Backend = "torch",
) -> Tensor:
    """Compute the causal gated delta rule in chunks of tokens.

    Every head has a state S [Dk, Dv], zero at first. A token does ``S = exp(log_decay) S``, then
    ``S = S + k (beta (v - S^T k))^T``, and its output is ``S^T q``. With a unit key and beta = 1
    the state then returns v for k. The caller normalizes k and scales q.

    The work is done in float32, or in float64 where an argument has it, also under autocast. A
    finite change of a token changes no bit of the outputs before it; inf and nan reach their whole
    chunk. Memory grows with N alone: per token the inputs, a row of the chunk's matrices and its
    share of one state per chunk.

    Args:
        q, k: [B, N, H, Dk].
        v: [B, N, H, Dv].
        beta: [B, N, H], how much of the old value is replaced, in [0, 1] (or up to 2).
        log_decay: [B, N, H], at most 0.
        chunk_size: Greatest number of tokens in a chunk. It changes rounding and time only.
        backend: "torch" works on every device. "fla" calls the Triton kernels of
            flash-linear-attention for CUDA tensors, with q and k in the dtype of v and chunks of
            16, 32 or 64. That call follows the library's source (0.5.2); neither its results nor
            its speed have been measured on a GPU, and it breaks the graph of torch.compile.

    Returns:
        [B, N, H, Dv] in the dtype of v.

    Raises:
        ValueError: Shapes do not match, or the backend cannot be used.

    Source: arXiv 2412.06464 (Gated DeltaNet); its chunks extend those of arXiv 2406.06484.
    """
    gates = {"beta": beta, "log_decay": log_decay}
    dtype = check(chunk_size, k, v, like_k={"q": q}, like_v={}, gates=gates)
    if backend not in get_args(Backend):
        raise ValueError(f"backend ({backend!r}) must be one of {', '.join(get_args(Backend))}")
    if backend == "fla":
        if not q.is_cuda:
            raise ValueError(
                f"backend ('fla') must have CUDA tensors, not {q.device}: take 'torch'"
            )
        return _fla(q, k, v, beta, log_decay, chunk_size)
    with without_autocast(q.device):
        return _chunked(q, k, v, beta, log_decay, Chunks(q.shape[1], chunk_size), dtype).to(v.dtype)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    chunks: Chunks,
    dtype: torch.dtype,
) -> Tensor:
    """Compute all chunks at once but for the state.

    With b the sum of log_decay from the chunk's start, the values that the tokens of a chunk write,
    U = beta (v - S^T k), obey (I + A) U = beta v - beta exp(b) k S, where S is the state before the
    chunk and A = beta k k^T exp(b_i - b_j) below the diagonal.
    """
    heads = q.shape[2]
    gates = (beta.unsqueeze(-1), log_decay.unsqueeze(-1))
    q, k, v, beta, log_decay = (chunks.split(x, dtype) for x in (q, k, v, *gates))
    # In float64, so that a small difference of two large sums has the precision of the result.
    total = log_decay.double().cumsum(1)  # [M, C, 1] with M = B * H * number of chunks
    last = total[:, -1:]
    # exp of a difference overflows above the diagonal, where nothing is read.
    later = torch.ones(chunks.length, chunks.length, dtype=torch.bool, device=q.device).triu(1)
    between = (total - total.mT).to(dtype).masked_fill(later, -torch.inf).exp()  # [M, C, C]
    since_start, until_end = total.to(dtype).exp(), (last - total).to(dtype).exp()  # [M, C, 1]
    weighted_k = beta * k
    # The solve takes the diagonal as ones and reads nothing above it.
    solved = torch.linalg.solve_triangular(
        (weighted_k @ k.mT) * between,
        torch.cat([beta * v, -since_start * weighted_k], -1),
        upper=False,
        unitriangular=True,
    )
    value, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    states, value = scan(
        chunks.num,
        decay=last.to(dtype).exp(),
        read=read,
        write=(until_end * k).mT,
        value=value,
    )
    inside = ((q @ k.mT) * between) @ value
    return chunks.join(torch.baddbmm(inside, since_start * q, states), heads)


def _fla(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, chunk_size: int
) -> Tensor:
    if chunk_size not in FLA_CHUNK_SIZES:
        sizes = ", ".join(map(str, FLA_CHUNK_SIZES))
        raise ValueError(f"chunk_size ({chunk_size}) must be one of {sizes} with backend 'fla'")
    try:
        kernels = import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise ValueError(
            "backend ('fla') must be installed: pip install flash-linear-attention, or take 'torch'"
        ) from error
    o, _ = kernels.chunk_gated_delta_rule(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=log_decay,
        beta=beta,
        scale=1.0,
        use_qk_l2norm_in_kernel=False,
        chunk_size=chunk_size,
    )
    return o

"""Chunks of tokens, and the loop over them that carries the state of a recurrence.

Inside a chunk, every recurrence here is a triangular system with matrix products around it, for all
chunks at once. Only the state passes from chunk to chunk in order.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Chunks", "check", "scan", "without_autocast"]


class Chunks:
    """A division of N tokens into chunks of equal length, at most ``chunk_size``.

    The length is the smallest that gives the same number of chunks: 77 tokens in chunks of up to 64
    are 2 x 39 with one zero token at the end, not 2 x 64 with 51.

    Args:
        num_tokens: N.
        chunk_size: Greatest length of a chunk.
    """

    def __init__(self, num_tokens: int, chunk_size: int) -> None:
        self.num_tokens = num_tokens
        self.num = -(-num_tokens // chunk_size)
        self.length = -(-num_tokens // self.num)

    @property
    def padding(self) -> int:
        """Number of zero tokens after the last one."""
        return self.num * self.length - self.num_tokens

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the chunks of all heads, [B * H * num, length, D], of ``x`` [B, N, H, D]."""
        x = F.pad(x.transpose(1, 2).to(dtype), (0, 0, 0, self.padding))  # [B, H, N + padding, D]
        return x.reshape(-1, self.length, x.shape[-1])

    def join(self, x: Tensor, heads: int) -> Tensor:
        """Return [B, N, H, D], the tokens of the chunks ``x`` [B * H * num, length, D]."""
        x = x.reshape(-1, heads, self.num * self.length, x.shape[-1])  # [B, H, N + padding, D]
        return x[:, :, : self.num_tokens].transpose(1, 2)


def scan(
    num_chunks: int,
    *,
    decay: Tensor,
    read: Tensor,
    write: Tensor,
    value: Tensor,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Carry a state S [K, V] through the chunks of every head, from zero.

    A chunk replaces its values by ``U = value + read S``, then the state by
    ``decay S + write U + added``.

    Args:
        num_chunks: Number of chunks of a head; they are neighbours in the first axis of all
            tensors, whose size is M = B * H * num_chunks.
        decay: [M, 1 or K, 1].
        read: [M, C, K].
        write: [M, K, C].
        value: [M, C, V].
        added: [M, K, V].

    Returns:
        The states before each chunk, [M, K, V], and U, [M, C, V].
    """

    def steps(x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(0, (-1, num_chunks)).unbind(1)

    decays, reads, writes, values = steps(decay), steps(read), steps(write), steps(value)
    additions = None if added is None else steps(added)
    states = [values[0].new_zeros(len(values[0]), write.shape[1], value.shape[2])]
    replaced = [values[0]]
    for i, j in pairwise(range(num_chunks)):
        kept = decays[i] * states[i]
        kept = kept if additions is None else kept + additions[i]
        states.append(torch.baddbmm(kept, writes[i], replaced[i]))
        replaced.append(torch.baddbmm(values[j], reads[j], states[j]))
    return torch.stack(states, 1).flatten(0, 1), torch.stack(replaced, 1).flatten(0, 1)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, in which a recurrence chooses its dtypes itself."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check(
    chunk_size: int,
    k: Tensor,
    v: Tensor,
    *,
    like_k: dict[str, Tensor],
    like_v: dict[str, Tensor],
    gates: dict[str, Tensor],
) -> torch.dtype:
    """Check a recurrence's arguments and return the dtype to compute in: float64 where any tensor
    has it, otherwise float32.

    Args:
        chunk_size: Must be at least 1.
        k: Must be [B, N, H, Dk].
        v: Must be [B, N, H, Dv].
        like_k: Tensors that must have the shape of k, by their names.
        like_v: Tensors that must have the shape of v.
        gates: Tensors that must be [B, N, H].

    Raises:
        ValueError: An argument is not what it must be.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    for name, x in {"k": k, "v": v}.items():
        if x.dim() != 4 or 0 in x.shape:
            shape = tuple(x.shape)
            raise ValueError(f"{name}.shape {shape} must be [B, N, H, D] with no empty axis")
    shapes = {"v": (v, k.shape[:3] + v.shape[3:])}
    shapes |= {name: (x, k.shape) for name, x in like_k.items()}
    shapes |= {name: (x, v.shape) for name, x in like_v.items()}
    shapes |= {name: (x, k.shape[:3]) for name, x in gates.items()}
    for name, (x, shape) in shapes.items():
        if x.shape != shape:
            raise ValueError(
                f"{name}.shape {tuple(x.shape)} must be {tuple(shape)} with k.shape "
                f"{tuple(k.shape)} and v.shape {tuple(v.shape)}"
            )
    dtypes = {name: x.dtype for name, (x, _) in shapes.items()} | {"k": k.dtype}
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise ValueError(f"{name}.dtype ({dtype}) must be a floating type")
    return torch.float64 if torch.float64 in dtypes.values() else torch.float32

"""Associative recall with several queries: pairs of a key and a value, then keys to be answered.

The task is MQAR of arXiv 2312.04927, made simpler in two ways: queries stand at places drawn
uniformly instead of by a power law, and the tokens between them are one filler token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORED", "RecallTask"]

#: The target of a token that is not a query, as torch's cross-entropy has it.
IGNORED = -100


@dataclass(frozen=True)
class RecallTask:
    """Sequences of ``length`` tokens: ``pairs`` keys, each followed by its value, then each key
    once more, as a query, among filler tokens.

    Token 0 is the filler; then come ``num_keys`` keys and as many values. Keys and values of a
    sequence are distinct, and every sequence has its own assignment.
    """

    pairs: int
    length: int
    num_keys: int = 16

    def __post_init__(self) -> None:
        if self.pairs > self.num_keys:
            raise ValueError(
                f"pairs ({self.pairs}) must not be more than num_keys: take {self.num_keys}"
            )
        if self.length < 3 * self.pairs:
            raise ValueError(
                f"length ({self.length}) must hold a key, a value and a query for each of "
                f"{self.pairs} pairs: take {3 * self.pairs}"
            )

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return 1 + 2 * self.num_keys

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows which values were given but not whose they are."""
        return 1 / self.pairs

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw sequences.

        Args:
            count: Number of sequences B.
            generator: The source of all random numbers, on the CPU.

        Returns:
            Tokens and targets [B, length] int64; the target of a query is the value of its key, all
            other targets are ``IGNORED``.
        """

        def choose(number: int, among: int) -> Tensor:  # distinct in every row
            return torch.rand(count, among, generator=generator).argsort(dim=1)[:, :number]

        keys = 1 + choose(self.pairs, self.num_keys)  # [B, pairs]
        values = 1 + self.num_keys + choose(self.pairs, self.num_keys)
        start = 2 * self.pairs
        places = start + choose(self.pairs, self.length - start)
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        tokens.scatter_(1, places, keys)
        targets = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
        return tokens, targets

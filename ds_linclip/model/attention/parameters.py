"""What a kind of attention says about a parameter of its own."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["OwnParameter"]


class OwnParameter(NamedTuple):
    """A parameter that softmax attention does not have.

    Attributes:
        shape: Shape of the whole parameter, over all heads.
        init: Initializes the whole parameter in place.
        split: Dimension of the heads, which the tensor axis splits; None: every head uses all of
            it.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], object]
    split: int | None = 0

"""What a kind of attention says about a parameter of its own."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["OwnParameter", "uniform"]


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


def uniform(fan_in: int) -> Callable[[Tensor], object]:
    """Return torch's initialization of linear and convolutional layers with ``fan_in`` inputs."""
    return partial(nn.init.uniform_, a=-(fan_in**-0.5), b=fan_in**-0.5)

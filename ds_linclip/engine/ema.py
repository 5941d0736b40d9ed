"""The running average of the weights: sharded, saved and restored like the optimizer's state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import optim

from ds_linclip.engine.zero_state import fill_module

__all__ = ["ema_weights", "track_ema"]

_KEY = "ema"


def track_ema(optimizer: optim.Optimizer) -> None:
    """Have ``optimizer`` keep a running average of its weights; before ``deepspeed.initialize``.

    The average is in fp32 like the master weights: 4 bytes per parameter, divided over the ranks
    from ZeRO-1 on. The first step starts it; every further step moves it by
    ``1 - group["ema_decay"]``, which the engine sets before the step together with ``lr``. A step
    that is skipped because its gradient is not finite leaves the average as it is.
    """
    optimizer.register_step_post_hook(_update)


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """Put the averages in the place of the weights of ``engine.module``; a collective of all ranks.

    Before the first step there is no average and the weights stay. No extra memory is needed:
    weights and averages are swapped in the optimizer, and DeepSpeed fills the module from there, as
    after a step. Afterwards the weights are the same bit for bit. No training step may be taken in
    this context. When an exception leaves it the averages stay, since only one rank may have raised
    it and swapping back is a collective.
    """
    _swap(engine.optimizer)
    yield
    _swap(engine.optimizer)


@torch.no_grad()
def _update(optimizer: optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Move the averages of the weights just updated; under ZeRO-3, those of one sub-group."""
    for group in optimizer.param_groups:
        for weights in group["params"]:
            state = optimizer.state.get(weights)
            if not state:  # never updated; an entry here would keep the optimizer from starting
                continue
            if _KEY in state:
                state[_KEY].lerp_(weights, 1 - group["ema_decay"])
            else:
                state[_KEY] = weights.detach().clone()


def _swap(zero: Any) -> None:
    states = getattr(zero, "optimizer", zero).state
    for weights, state in states.items():
        if _KEY in state:
            weights.data, state[_KEY] = state[_KEY], weights.data
    fill_module(zero)

"""The running average of the weights: sharded, saved and restored as the optimizer's state is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import optim

from ds_linclip.engine.zero_state import fill_module

__all__ = ["ema_weights", "track_ema"]

_KEY = "ema"


def track_ema(optimizer: optim.Optimizer) -> None:
    """Let ``optimizer`` keep the average of what it updates; before ``deepspeed.initialize``.

    The average is in fp32 like the weights that DeepSpeed's optimizer owns: 4 bytes per parameter,
    divided by the ranks from ZeRO-1 on. The first step starts it, every further one moves it by
    ``1 - group["ema_decay"]``, which the training loop sets before the step as it does ``lr``. A
    step that is skipped for an overflow leaves the average alone.
    """
    optimizer.register_step_post_hook(_update)


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """The averages in place of the weights of ``engine.module``; every rank calls it together.

    Before the first step there is no average and the weights stay. Needs no extra memory: weights
    and averages change places in the optimizer, and DeepSpeed fills the module from there, as it
    does after a step; bit for bit the same again afterwards. No training step within. An exception
    leaves the averages there: it may be one rank's alone, and changing back takes all of them.
    """
    _exchange(engine.optimizer)
    yield
    _exchange(engine.optimizer)


@torch.no_grad()
def _update(optimizer: optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Runs for every group (ZeRO-1 and 2) or sub-group (ZeRO-3): only what was updated is there."""
    for group in optimizer.param_groups:
        for weights in group["params"]:
            state = optimizer.state.get(weights)
            if not state:  # never updated; an entry here would keep the optimizer from starting
                continue
            if _KEY in state:
                state[_KEY].lerp_(weights, 1 - group["ema_decay"])
            else:
                state[_KEY] = weights.detach().clone()


def _exchange(zero: Any) -> None:
    states = getattr(zero, "optimizer", zero).state
    for weights, state in states.items():
        if _KEY in state:
            weights.data, state[_KEY] = state[_KEY], weights.data
    fill_module(zero)

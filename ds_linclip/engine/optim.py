"""Optimizers with weight-decay groups, and the schedules of learning rate and EMA decay."""

from typing import Any

from torch import nn, optim

from ds_linclip.config import OptimConfig
from ds_linclip.engine.lamb import Lamb

__all__ = ["build_optimizer", "ema_decay", "learning_rate", "weight_decay_groups"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> optim.Optimizer:
    """Return the optimizer of ``config`` over the trainable parameters.

    AdamW is torch's (fused), Lion is timm's (arXiv 2302.06675; it has no eps), LAMB is
    :class:`Lamb`, whose ``attach`` must be called before its first step.
    """
    groups = weight_decay_groups(model, config.weight_decay)
    if config.kind == "lion":
        from timm.optim import Lion  # importing timm takes seconds

        return Lion(groups, lr=config.lr, betas=config.betas)
    if config.kind == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices with weight decay, vectors without.

    The vectors are norms, biases, the class embedding and the logit scale, as in open_clip.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        (kept if parameter.ndim < 2 else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of the 0-based ``step`` of all ``steps``: linear warm-up to
    ``config.lr``, then ``config.schedule``."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * config.schedule.factor(step - warmup, steps - warmup)


def ema_decay(step: int, decay: float) -> float:
    """Return the weight of the old average in the update after the 0-based ``step``: ``decay``
    after a warm-up.

    The warm-up is TensorFlow's and torch_ema's, ``(1 + step) / (10 + step)``: the average spans
    about the last tenth of the steps until ``decay`` is reached, 0.9999 after 90 thousand.
    """
    return min(decay, (1 + step) / (10 + step))

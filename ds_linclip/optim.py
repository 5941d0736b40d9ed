"""AdamW with weight-decay groups, and the learning rate as a pure function of the step."""

import math
from typing import Any

from torch import nn, optim

from ds_linclip.config import OptimConfig

__all__ = ["build_optimizer", "learning_rate", "weight_decay_groups"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> optim.Optimizer:
    """AdamW over the trainable parameters of ``model``, in :func:`weight_decay_groups`."""
    return optim.AdamW(
        weight_decay_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices are decayed; vectors are not.

    The vectors are norms, biases, the class embedding and the logit scale: open_clip's rule.
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
    """Linear warm-up to ``config.lr``, then half a cosine to zero.

    Args:
        step: the step about to be taken, 0-based.
        steps: steps of the whole run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))

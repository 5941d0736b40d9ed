"""Frozen towers: weights that are used but not trained (LiT, arXiv 2111.07991)."""

import torch
from torch import nn

from ds_linclip.config import InitConfig
from ds_linclip.model.clip import CLIP

__all__ = ["lock_towers"]


def lock_towers(model: CLIP, config: InitConfig) -> None:
    """Freeze weights as ``config`` says: no gradients, no optimizer state."""
    if config.lock_image and model.visual is not None:
        model.visual.lock(config.lock_image_unlocked_groups)
    if config.lock_text and model.text is not None:
        model.text.lock(config.lock_text_unlocked_layers)
    _complete_groups(model)


def _complete_groups(model: CLIP) -> None:
    """Add a parameter of zeros to a pipeline stage that trains no matrix or no vector.

    DeepSpeed sums gradient norms over the stages for each parameter group of the optimizer, so no
    group may be empty on any stage. Zeros without a gradient stay zeros.
    """
    is_vector = {p.ndim < 2 for p in model.parameters() if p.requires_grad}
    if True not in is_vector:
        model.nothing_in_a_vector = _placeholder(1, device=model.mesh.device)
    if False not in is_vector:
        model.nothing_in_a_matrix = _placeholder(1, 1, device=model.mesh.device)


def _placeholder(*shape: int, device: torch.device) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, device=device))
    # Marks it as not part of the model: neither saved nor loaded.
    setattr(parameter, "is_placeholder", True)  # noqa: B010 - Parameter does not know it
    return parameter

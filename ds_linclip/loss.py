"""Contrastive loss over the data-parallel axis."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Symmetric InfoNCE of CLIP (arXiv 2103.00020), local rows against global columns.

    Every rank scores its own pairs against the pairs of all ranks in ``group``. The mean of the
    returned values over the ranks is the loss of the global batch, and averaging the ranks'
    parameter gradients (what data parallelism does) gives exactly its gradient, because the gather
    hands every column's gradient back to the rank it came from.

    Args:
        image_features: L2-normalised, [B, E].
        text_features: L2-normalised, [B, E]; row i belongs to image i.
        logit_scale: scalar factor on the cosine similarities.
        group: ranks whose pairs are each other's negatives; all hold the same B. None: this
            process alone.

    Returns:
        Scalar: mean cross-entropy over this rank's rows, both directions averaged.
    """
    num_local = image_features.shape[0]
    first = 0
    all_features = torch.stack([image_features, text_features])[None]  # [1, 2, B, E]
    if group is not None and group.size() > 1:
        first = group.rank() * num_local
        all_features = _AllGather.apply(all_features, group)  # [R, 2, B, E]
    all_images, all_texts = all_features.transpose(0, 1).flatten(1, 2)  # [R*B, E] each
    labels = torch.arange(first, first + num_local, device=image_features.device)
    per_image = logit_scale * image_features @ all_texts.T  # [B, R*B]
    per_text = logit_scale * text_features @ all_images.T  # [B, R*B]
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


class _AllGather(torch.autograd.Function):
    """Concatenate over the group along dim 0; the backward sums each slice on its owner."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None

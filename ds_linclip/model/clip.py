"""CLIP: an image and a text tower that share a space, and the learned scale of their similarity."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import ModelConfig
from ds_linclip.model.towers import TextTransformer, VisionTransformer
from ds_linclip.parallel.mesh import Mesh

__all__ = ["CLIP"]

MAX_LOGIT_SCALE = 100.0


class CLIP(nn.Module):
    """Contrastive image-text model (arXiv 2103.00020) with the attention of ``config``.

    The weights come from torch's default CPU generator in a fixed order: seed it alike on all
    ranks, and they do not depend on the number of ranks.

    Args:
        config: both towers and the width of their common space.
        mesh: the tensor axis that splits the layers, and the device the model is put on.

    Raises:
        ValueError: when heads or vocabulary do not divide by the tensor-parallel size.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.visual = VisionTransformer(config.vision, config.embed_dim, mesh)
        self.text = TextTransformer(config.text, config.embed_dim, mesh)
        # One element, not a scalar: DeepSpeed cannot partition a tensor without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.to(mesh.device)

    def num_tokens(self, images: Tensor, texts: Tensor) -> int:
        """Tokens of a batch, images [B, 3, H, W] and texts [B, L], over both towers."""
        height, width = images.shape[2:]
        return len(images) * self.config.vision.num_tokens_at((height, width)) + texts.numel()

    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """Features [B, E] of ``images`` [B, 3, H, W]; with ``normalize``, fp32 of length one."""
        features = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, texts: Tensor, *, normalize: bool = False) -> Tensor:
        """Features [B, E] of ``texts`` [B, L] int64; with ``normalize``, fp32 of length one."""
        features = self.text(texts)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features of both, and the scale of their similarities.

        Args:
            images: [B, 3, H, W].
            texts: [B, L] int64.

        Returns:
            Image features [B, E], text features [B, E] and the logit scale [], all fp32; the scale
            lies in [1, 100] whatever value the optimizer has given the parameter.
        """
        return (
            self.encode_image(images, normalize=True),
            self.encode_text(texts, normalize=True),
            _ClampedExp.apply(self.logit_scale, self.mesh.dp_group).squeeze(0),
        )


class _ClampedExp(torch.autograd.Function):
    """``exp`` held in [1, 100]; beyond an end, only gradients that lead back pass.

    Clamping the parameter itself would not last: under ZeRO the optimizer owns an fp32 copy. Which
    way the gradient leads is asked of the whole global batch, not of each rank's part of it.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, dp_group: dist.ProcessGroup) -> Tensor:
        scale = log_scale.float().exp().clamp(1.0, MAX_LOGIT_SCALE)
        ctx.save_for_backward(log_scale, scale)
        ctx.dp_group = dp_group
        return scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        log_scale, scale = ctx.saved_tensors
        (grad,) = grad_outputs
        total = grad.clone()
        if ctx.dp_group.size() > 1:
            dist.all_reduce(total, group=ctx.dp_group)
        # Descent moves against the gradient.
        outward = ((scale >= MAX_LOGIT_SCALE) & (total < 0)) | ((scale <= 1.0) & (total > 0))
        return torch.where(outward, 0.0, grad * scale).to(log_scale.dtype), None

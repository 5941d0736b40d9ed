"""The contrastive objective of one step: the loss over the whole global batch, and the gradient of
every micro-batch's outputs, which is all that their backwards need to know of each other."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_linclip.config import LossConfig
from ds_linclip.loss.contrastive import clip_loss, siglip_loss
from ds_linclip.parallel.mesh import Mesh

__all__ = ["MAX_LOGIT_SCALE", "Objective", "surrogate"]

MAX_LOGIT_SCALE = 100.0

#: Image features [B, E], text features [B, E], logarithm of the logit scale [1] and, with the
#: sigmoid loss, the logit bias [1]: what :class:`~ds_linclip.model.CLIP` gives; or their gradients.
Outputs = tuple[Tensor, ...]


class Objective:
    """Loss of all micro-batches of a step together, negatives from the whole data axis.

    A step of several micro-batches runs in two passes: all of their outputs are computed without a
    graph, this object finds the loss and its gradient with respect to each output, and every
    micro-batch is run again to carry its own gradient back (:func:`surrogate`). The gradient of the
    parameters is that of the whole batch in one piece.

    Args:
        config: Which loss.
        mesh: Its data axis holds the pairs that are each other's negatives.

    Attributes:
        logit_scale: Factor on the cosine similarities in the last step, [].
    """

    def __init__(self, config: LossConfig, mesh: Mesh) -> None:
        self._config = config
        self._group = mesh.dp.group
        self.logit_scale = torch.ones(())

    def __call__(self, outputs: Sequence[Outputs]) -> tuple[Tensor, list[Outputs]]:
        """Loss and gradients of this rank's micro-batches.

        Args:
            outputs: Of every micro-batch; the parameters in them are the same in all.

        Returns:
            The loss [] of this rank's rows, whose mean over the data axis is that of the global
            batch; and for every micro-batch the gradients of its outputs, such that averaging the
            parameters' gradients over the data axis and summing them over micro-batches gives that
            of the global batch.
        """
        sizes = [len(output[0]) for output in outputs]
        images, texts = (
            torch.cat([output[side] for output in outputs]).detach().requires_grad_()
            for side in (0, 1)
        )
        log_scale, *bias = (parameter.detach().float() for parameter in outputs[0][2:])
        # Held in [1, 100]. Clamping the parameter itself would not last: under ZeRO the optimizer
        # owns an fp32 copy.
        scale = log_scale.exp().clamp(1.0, MAX_LOGIT_SCALE).squeeze(0).requires_grad_()
        bias = [value.squeeze(0).requires_grad_() for value in bias]
        loss = self._loss(images, texts, scale, *bias)
        loss.backward()
        self.logit_scale = scale.detach()

        # The same on all ranks: which way the scale leads is for the global batch to say.
        shared = torch.stack([value.grad for value in (scale, *bias) if value.grad is not None])
        dist.all_reduce(shared, group=self._group)
        shared /= self._group.size() * len(outputs)
        shared[0] *= _is_free(self.logit_scale, shared[0]) * self.logit_scale  # d exp(x) = exp(x)
        assert images.grad is not None
        assert texts.grad is not None
        parts = zip(images.grad.split(sizes), texts.grad.split(sizes), strict=True)
        return loss.detach(), [(*part, *shared.split(1)) for part in parts]

    def _loss(self, images: Tensor, texts: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
        chunk_size = self._config.chunk_size
        if self._config.kind == "softmax":
            return clip_loss(images, texts, scale, self._group, chunk_size=chunk_size)
        return siglip_loss(images, texts, scale, bias[0], self._group, chunk_size=chunk_size)


def surrogate(outputs: Outputs, gradients: Outputs) -> Tensor:
    """A scalar whose gradient is ``gradients`` in ``outputs``."""
    products = (
        (output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)
    )
    return sum(products, start=torch.zeros((), device=outputs[0].device))


def _is_free(scale: Tensor, gradient: Tensor) -> Tensor:
    """Whether a step against the gradient keeps the scale in its bounds, or leads back to them."""
    outward = ((scale >= MAX_LOGIT_SCALE) & (gradient < 0)) | ((scale <= 1.0) & (gradient > 0))
    return ~outward

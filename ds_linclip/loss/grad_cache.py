"""The contrastive loss of one optimizer step, with micro-batches (GradCache, arXiv 2101.06983).

The loss of the global batch gives a gradient for the outputs of every micro-batch, and the
micro-batches are then backpropagated one by one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_linclip.config import LossConfig, LossTerm
from ds_linclip.loss.contrastive import clip_loss, siglip_loss
from ds_linclip.loss.distillation import feature_loss, similarity_loss
from ds_linclip.parallel.mesh import Mesh

__all__ = ["ContrastiveLoss", "Outputs", "Targets", "bounded_log_scale", "surrogate"]

_MAX_LOG_SCALE = math.log(100)

#: Outputs of :class:`~ds_linclip.model.CLIP`, or their gradients: image features [B, E], text
#: features [B, E], logarithm of the logit scale [1] and, with the sigmoid loss, the logit bias [1].
#: In a layer-wise transfer the errors of the layers [B, layers] take the place of features.
Outputs = tuple[Tensor, ...]


#: What a teacher says of this rank's pairs: image features [B, T] and text features [B, T], fp32
#: of length one, and the factor [] on their cosines; empty without a teacher.
Targets = tuple[Tensor, ...]


class ContrastiveLoss:
    """The loss of all micro-batches of a step, with negatives from all data-parallel ranks: the
    weighted sum of the terms of the config.

    A step of several micro-batches runs in two passes. The first computes all outputs without a
    graph; this class computes the loss and its gradient for every output; the second pass runs
    every micro-batch again and backpropagates its gradient (:func:`surrogate`). The gradient of the
    parameters is the same as that of the whole batch at once.

    Attributes:
        logit_scale: Factor on the cosine similarities in the last step, [].
        weights: Factor on every term in the next step.
        values: This rank's value of every term in the last step, before the factor, [terms].
    """

    def __init__(self, config: LossConfig, mesh: Mesh) -> None:
        self._config = config
        self._group = mesh.dp.group
        self.logit_scale = torch.ones(())
        self.weights = [term.weight for term in config.terms]
        self.values = torch.zeros(len(config.terms))
        self._compute: Callable[..., Tensor] = self._terms

    def set_weights(self, step: int, steps: int) -> None:
        """Set the factors on the terms for the 0-based ``step`` of all ``steps``."""
        self.weights = [term.weight_at(step, steps) for term in self._config.terms]

    def scalars(self) -> dict[str, float]:
        """Return every term of the last step, over the global batch and before its factor, by tag;
        nothing where it is the only one. A collective of the data-parallel ranks."""
        terms = self._config.terms
        if len(terms) == 1:
            return {}
        means = self.values.clone()
        dist.all_reduce(means, group=self._group)
        means /= self._group.size()
        return {f"train/loss_{t.kind}": v for t, v in zip(terms, means.tolist(), strict=True)}

    def compile(self, **options: Any) -> None:
        """Compute the loss and its gradients of the features under torch.compile."""
        self._compute = torch.compile(self._terms, **options)

    def __call__(
        self, outputs: Sequence[Outputs], targets: Targets = ()
    ) -> tuple[Tensor, list[Outputs]]:
        """Compute loss and gradients of this rank's micro-batches.

        Args:
            outputs: The model's outputs for every micro-batch. Scale and bias are the same in all.
            targets: The teacher's, for the rows of all micro-batches; needed by terms that compare
                with a teacher.

        Returns:
            The loss [] of this rank's pairs, whose mean over the data-parallel ranks is the loss of
            the global batch; and the gradients of the outputs of every micro-batch, scaled so that
            summing parameter gradients over micro-batches and averaging them over the ranks gives
            the gradient of the global batch.
        """
        sizes = [len(output[0]) for output in outputs]
        images, texts = (
            torch.cat([output[side] for output in outputs]).detach().requires_grad_()
            for side in (0, 1)
        )
        log_scale, *bias = (parameter.detach().float() for parameter in outputs[0][2:])
        log_scale = bounded_log_scale(log_scale)
        scale = log_scale.exp().squeeze(0).requires_grad_()
        bias = [value.squeeze(0).requires_grad_() for value in bias]
        values = self._compute(images, texts, targets, scale, *bias)
        loss = values @ values.new_tensor(self.weights)
        loss.backward()
        self.values = values.detach().clone()
        self.logit_scale = scale.detach()

        # Averaged over the ranks first: whether the scale is free depends on the global gradient.
        scalars = (scale, *bias)
        shared = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in scalars])
        dist.all_reduce(shared, group=self._group)
        shared /= self._group.size() * len(outputs)
        shared[:1] *= _is_free(log_scale, shared[:1]) * self.logit_scale  # d exp(x) = exp(x) dx
        assert images.grad is not None
        assert texts.grad is not None
        parts = zip(images.grad.split(sizes), texts.grad.split(sizes), strict=True)
        # A copy: a replay of a CUDA graph writes the next loss to the same place.
        return loss.detach().clone(), [(*part, *shared.split(1)) for part in parts]

    def _terms(
        self, images: Tensor, texts: Tensor, targets: Targets, scale: Tensor, *bias: Tensor
    ) -> Tensor:
        """Return the value of every term, [terms]."""
        terms = self._config.terms
        return torch.stack(
            [self._term(term, images, texts, targets, scale, *bias) for term in terms]
        )

    def _term(
        self,
        term: LossTerm,
        images: Tensor,
        texts: Tensor,
        targets: Targets,
        scale: Tensor,
        *bias: Tensor,
    ) -> Tensor:
        spread: dict[str, Any] = {"group": self._group, "chunk_size": self._config.chunk_size}
        if term.kind == "layers":  # of both towers' errors, not of features
            return (images.mean() + texts.mean()) / 2
        if term.kind == "features":
            return feature_loss(images, texts, *targets[:2])
        if term.kind == "similarity":
            teacher_images, teacher_texts, teacher_scale = targets
            if term.temperature is not None:
                scale = teacher_scale = torch.full_like(scale, 1 / term.temperature)
            teacher = (teacher_images, teacher_texts, teacher_scale)
            return similarity_loss(images, texts, scale, *teacher, **spread)
        if self._config.kind == "softmax":
            return clip_loss(images, texts, scale, **spread)
        return siglip_loss(images, texts, scale, bias[0], **spread)


def surrogate(outputs: Outputs, gradients: Outputs) -> Tensor:
    """Return a scalar whose gradient with respect to ``outputs`` is ``gradients``."""
    products = (
        (output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)
    )
    return sum(products, start=torch.zeros((), device=outputs[0].device))


def bounded_log_scale(log_scale: Tensor) -> Tensor:
    """Return the logarithm of the logit scale that the loss uses: that of a scale in 1..100.

    The optimizer's momentum may carry the parameter past these bounds.
    """
    return log_scale.clamp(0.0, _MAX_LOG_SCALE)


def _is_free(log_scale: Tensor, gradient: Tensor) -> Tensor:
    """Return whether a step against the gradient stays within the bounds or returns to them."""
    is_above, is_below = log_scale >= _MAX_LOG_SCALE, log_scale <= 0
    return ~((is_above & (gradient < 0)) | (is_below & (gradient > 0)))

"""Contrastive losses of the global batch, in memory that grows linearly with the batch.

Logits are computed in square tiles, never all at once. Every rank processes the tiles that contain
its own images or texts, so it obtains the complete gradient of its own features, and no gradients
have to be sent between ranks.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ds_linclip.loss.global_batch import (
    FeatureGradient,
    GlobalBatch,
    loss_of_global_batch,
    row_products,
)

__all__ = ["clip_loss", "num_tiles", "siglip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_size: int = 1024,
) -> Tensor:
    """Symmetric InfoNCE of CLIP (arXiv 2103.00020), each pair against those of all ranks.

    The mean of the returned values over the ranks of ``group`` is the loss of the global batch, and
    averaging the ranks' parameter gradients (what data parallelism does) gives exactly its
    gradient. It can be differentiated once.

    Communication: one all-gather of the features and, if a gradient is needed, one of two numbers
    per pair; none in the backward.

    Args:
        image_features: L2-normalised, [B, E], float32 or float64 (or bfloat16: multiplied as such,
            summed in float32). All that this rank contributes to the global batch.
        text_features: L2-normalised, [B, E]; row i belongs to image i.
        logit_scale: One number, the factor on the cosine similarities.
        group: Ranks whose pairs are each other's negatives; all have the same B, and all or none
            need a gradient. None: this process alone.
        chunk_size: Side of the tiles. Beyond features and their gradients, memory is a few times
            its square. It changes the result only by rounding.

    Returns:
        Scalar, float32 or wider: mean cross-entropy of this rank's images and texts.

    Raises:
        ValueError: for arguments whose shapes, types or devices do not fit.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    features = {"image_features": image_features, "text_features": text_features}
    return loss_of_global_batch(_clip, features | {"logit_scale": logit_scale}, group, chunk_size)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_size: int = 1024,
) -> Tensor:
    """Pairwise sigmoid loss of SigLIP (arXiv 2303.15343), each image against all ranks' texts.

    Every combination of an image and a text is a binary classification: do they belong together?
    The mean of the returned values over the ranks of ``group`` is the sum over all combinations
    divided by the global batch, and averaging the ranks' parameter gradients gives exactly its
    gradient. It can be differentiated once.

    Communication: one all-gather of the features; none in the backward.

    Arguments and errors are those of :func:`clip_loss`; ``logit_bias`` is one number, added to the
    scaled similarities.

    Returns:
        Scalar, float32 or wider: sum over this rank's images and all texts, divided by B.
    """
    features = {"image_features": image_features, "text_features": text_features}
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    return loss_of_global_batch(_siglip, features | scalars, group, chunk_size)


def num_tiles(pairs: int, num_ranks: int, chunk_size: int) -> int:
    """Return how many tiles a rank with ``pairs`` pairs of its own computes in either loss."""
    return (2 * num_ranks - 1) * math.ceil(pairs / chunk_size) ** 2


def _clip(
    batch: GlobalBatch, scale: Tensor, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    positive = scale * row_products(batch.own_images, batch.own_texts)  # [B]
    # Log-sum-exp of the negatives of every own image and text. The positive is kept apart, because
    # in a common sum the loss of a well classified pair would vanish in rounding.
    negative = batch.log_sums(scale, without_pairs=True)
    loss = -F.logsigmoid(positive - negative).mean()
    if not with_gradient:
        return loss, ()

    # d loss / d logits: the probability among the image's texts plus the probability among the
    # text's images, minus two for the pairs themselves.
    log_sums = batch.gather(torch.logaddexp(negative, positive))  # [R, 2, B]
    pairs = -torch.sigmoid(negative - positive).sum(0)  # [B]
    gradient = FeatureGradient(batch)
    for tile in batch.tiles():
        logits = tile.logits(scale)
        weights = (logits - log_sums[tile.image_rank, 0, tile.rows, None]).exp_()
        weights += logits.sub_(log_sums[tile.text_rank, 1, tile.columns]).exp_()
        if tile.is_diagonal:
            weights.diagonal().copy_(pairs[tile.rows])
        gradient.add(tile, weights)
    return loss, gradient.scaled(scale, 2 * len(positive))


def _siglip(
    batch: GlobalBatch, scale: Tensor, bias: Tensor, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    losses = scale.new_zeros(len(batch.own_images))
    bias_gradients = torch.zeros_like(losses)
    gradient = FeatureGradient(batch) if with_gradient else None
    for tile in batch.tiles():
        if gradient is None and not tile.has_own_images:
            continue
        logits = tile.logits(scale).add_(bias)
        if tile.is_diagonal:
            logits.diagonal().neg_()
        if tile.has_own_images:
            losses[tile.rows] -= F.logsigmoid(-logits).sum(1)
        if gradient is None:
            continue
        weights = logits.sigmoid_()
        if tile.is_diagonal:
            weights.diagonal().neg_()
        if tile.has_own_images:
            bias_gradients[tile.rows] += weights.sum(1)
        gradient.add(tile, weights)
    loss = losses.mean()
    if gradient is None:
        return loss, ()
    return loss, (*gradient.scaled(scale, len(losses)), bias_gradients.mean())

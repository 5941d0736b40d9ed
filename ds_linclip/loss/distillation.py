"""Losses that compare a student's features with a teacher's."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_linclip.loss.global_batch import FeatureGradient, GlobalBatch, Tile, loss_of_global_batch

__all__ = ["feature_loss", "similarity_loss"]


def feature_loss(
    image_features: Tensor, text_features: Tensor, teacher_images: Tensor, teacher_texts: Tensor
) -> Tensor:
    """Cosine distance to the teacher's features of the same inputs, averaged over both towers.

    For features of length one this is half the squared distance, the feature distillation of
    CLIP-KD (arXiv 2307.12732, section 3.2).

    Args:
        image_features: The student's, L2-normalised, [B, E].
        text_features: The student's, L2-normalised, [B, E].
        teacher_images: The teacher's, L2-normalised, [B, E].
        teacher_texts: The teacher's, L2-normalised, [B, E].

    Returns:
        Scalar between 0 and 2, float32 or wider.

    Raises:
        ValueError: when the teacher's features have another size.
    """
    if image_features.shape != teacher_images.shape:
        raise ValueError(
            f"teacher_images (shape {tuple(teacher_images.shape)}) must have the shape of "
            f"image_features ({tuple(image_features.shape)})"
        )
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    image_cosines = torch.linalg.vecdot(image_features.to(dtype), teacher_images.to(dtype))
    text_cosines = torch.linalg.vecdot(text_features.to(dtype), teacher_texts.to(dtype))
    return 1 - (image_cosines + text_cosines).mean() / 2


def similarity_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_size: int = 1024,
) -> Tensor:
    """KL divergence of the student's matching probabilities from the teacher's, over all ranks.

    Every image of the global batch has a probability for every text (a softmax of the scaled
    cosines), and every text one for every image; both divergences are averaged. This is the
    distillation of MobileCLIP (arXiv 2311.17049, equation 2) and the contrastive relational
    distillation of CLIP-KD (arXiv 2307.12732). As with
    :func:`~ds_linclip.loss.contrastive.clip_loss`, the mean over the ranks of ``group`` is the loss
    of the global batch, the mean of the ranks' gradients is its gradient, and it can be
    differentiated once.

    Communication: two all-gathers of features and one of four numbers per pair; none in the
    backward.

    Args:
        image_features: The student's, L2-normalised, [B, E], float32 or float64.
        text_features: The student's, L2-normalised, [B, E]; row i belongs to image i.
        logit_scale: One number, the factor on the student's cosines.
        teacher_images: The teacher's, L2-normalised, [B, T]; T need not be E.
        teacher_texts: The teacher's, L2-normalised, [B, T].
        teacher_scale: One number, the factor on the teacher's cosines.
        group: Ranks whose pairs form the global batch; None: this process alone.
        chunk_size: Side of the tiles of logits. It changes the result only by rounding.

    Returns:
        Scalar, float32 or wider, at least 0 up to rounding.

    Raises:
        ValueError: for arguments whose shapes, types or devices do not fit.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    if len(teacher_images) != len(image_features):
        raise ValueError(
            f"teacher_images ({len(teacher_images)} rows) must have a row for each of the "
            f"{len(image_features)} image_features"
        )
    teacher = GlobalBatch(teacher_images.detach(), teacher_texts.detach(), group, chunk_size)
    compute = partial(_similarity, teacher, teacher.scalar(teacher_scale.detach()))
    inputs = {"image_features": image_features, "text_features": text_features}
    return loss_of_global_batch(compute, inputs | {"logit_scale": logit_scale}, group, chunk_size)


def _similarity(
    teacher: GlobalBatch,
    teacher_scale: Tensor,
    batch: GlobalBatch,
    scale: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    own = batch.log_sums(scale), teacher.log_sums(teacher_scale)  # [2, B] each
    sums = batch.gather(torch.stack(own))  # [R, 2, 2, B]
    divergence = torch.zeros_like(own[0])
    gradient = FeatureGradient(batch)
    for tile, taught in zip(batch.tiles(), teacher.tiles(), strict=True):
        logits, targets = tile.logits(scale), taught.logits(teacher_scale).to(scale.dtype)
        found = _log_probabilities(tile, logits, sums[:, 0])
        wanted = _log_probabilities(tile, targets, sums[:, 1])
        if tile.has_own_images:
            divergence[0, tile.rows] += (wanted[0].exp() * (wanted[0] - found[0])).sum(1)
        if tile.has_own_texts:
            divergence[1, tile.columns] += (wanted[1].exp() * (wanted[1] - found[1])).sum(0)
        if with_gradient:
            gradient.add(tile, (torch.stack(found).exp() - torch.stack(wanted).exp()).sum(0))
    loss = divergence.mean()
    return loss, gradient.scaled(scale, 2 * divergence.shape[1]) if with_gradient else ()


def _log_probabilities(tile: Tile, logits: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the probabilities of the texts for every image of a tile and of the
    images for every text, [c, d] each; ``sums`` [R, 2, B] are those of
    :meth:`GlobalBatch.log_sums` of all ranks."""
    rows = sums[tile.image_rank, 0, tile.rows, None]
    columns = sums[tile.text_rank, 1, tile.columns]
    return logits - rows, logits - columns

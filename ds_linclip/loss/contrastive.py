"""Contrastive losses of the global batch, in memory that grows linearly with it.

Logits only exist as square tiles. Every rank works through the tiles that hold one of its own
images or texts, so that it ends with the whole gradient of its own features and none has to be sent
back to where a feature came from.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_loss", "siglip_loss"]


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
        logit_scale: one number, the factor on the cosine similarities.
        group: ranks whose pairs are each other's negatives; all hold the same B, and all or none
            need a gradient. None: this process alone.
        chunk_size: side of the tiles. Beyond features and their gradients, memory is a few times
            its square; the result depends on it by rounding only.

    Returns:
        Scalar, float32 or wider: mean cross-entropy of this rank's images and texts.

    Raises:
        ValueError: for arguments whose shapes, types or devices do not fit.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    inputs = {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": logit_scale,
    }
    _check(inputs, chunk_size)
    needs_gradient = _needs_gradient(inputs)
    with torch.no_grad(), _without_autocast(image_features.device):
        batch = _GlobalBatch(image_features, text_features, group, chunk_size)
        loss, gradients = _clip(batch, batch.scalar(logit_scale), needs_gradient)
    return _GivenGradients.apply(loss, gradients, *inputs.values()) if needs_gradient else loss


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

    Args:
        image_features: L2-normalised, [B, E], float32 or float64 (or bfloat16: multiplied as such,
            summed in float32). All that this rank contributes to the global batch.
        text_features: L2-normalised, [B, E]; row i belongs to image i.
        logit_scale: one number, the factor on the cosine similarities.
        logit_bias: one number, added to the scaled similarities.
        group: ranks whose pairs are each other's negatives; all hold the same B. None: this
            process alone.
        chunk_size: side of the tiles, as in :func:`clip_loss`.

    Returns:
        Scalar, float32 or wider: sum over this rank's images and all texts, divided by B.

    Raises:
        ValueError: for arguments whose shapes, types or devices do not fit.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    inputs = {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": logit_scale,
        "logit_bias": logit_bias,
    }
    _check(inputs, chunk_size)
    needs_gradient = _needs_gradient(inputs)
    with torch.no_grad(), _without_autocast(image_features.device):
        batch = _GlobalBatch(image_features, text_features, group, chunk_size)
        scale, bias = batch.scalar(logit_scale), batch.scalar(logit_bias)
        loss, gradients = _siglip(batch, scale, bias, needs_gradient)
    return _GivenGradients.apply(loss, gradients, *inputs.values()) if needs_gradient else loss


def _check(inputs: dict[str, Tensor], chunk_size: int) -> None:
    (image_name, images), (text_name, texts), *scalars = inputs.items()
    if images.ndim != 2 or len(images) < 1:
        shape = tuple(images.shape)
        raise ValueError(f"{image_name} (shape {shape}) must be [B, E] with at least one pair")
    # In float16 most probabilities of a large batch would be rounded to zero.
    if images.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"{image_name} ({images.dtype}) must be float32, float64 or bfloat16")
    for what in ("shape", "dtype", "device"):
        expected, found = getattr(images, what), getattr(texts, what)
        if found != expected:
            raise ValueError(f"{text_name} ({what} {found}) must match {image_name} ({expected})")
    for name, value in scalars:
        if value.numel() != 1:
            raise ValueError(f"{name} (shape {tuple(value.shape)}) must be one number")
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would take the logits to half precision; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _needs_gradient(inputs: dict[str, Tensor]) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in inputs.values())


def _clip(
    batch: "_GlobalBatch", scale: Tensor, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    positive = scale * _row_products(batch.own_images, batch.own_texts)  # [B]
    # Log-sum-exp of the negatives of each own image, each own text. Without the positive, because
    # the loss of a pair that is told apart well would vanish in the rounding of the common sum.
    negative = positive.new_full((2, len(positive)), -torch.inf)
    for tile in batch.tiles():
        logits = tile.logits(scale)
        if tile.is_diagonal:
            logits.fill_diagonal_(-torch.inf)
        if tile.has_own_images:
            so_far = negative[0, tile.rows]
            torch.logaddexp(so_far, logits.logsumexp(1), out=so_far)
        if tile.has_own_texts:
            so_far = negative[1, tile.columns]
            torch.logaddexp(so_far, logits.logsumexp(0), out=so_far)
    loss = -F.logsigmoid(positive - negative).mean()
    if not with_gradient:
        return loss, ()

    # d loss / d logits is the probability among the image's texts plus that among the text's
    # images, less two for the pairs themselves.
    log_sums = batch.gather(torch.logaddexp(negative, positive))  # [R, 2, B]
    pairs = -torch.sigmoid(negative - positive).sum(0)  # [B]
    gradient = _FeatureGradient(batch)
    for tile in batch.tiles():
        logits = tile.logits(scale)
        weights = (logits - log_sums[tile.image_rank, 0, tile.rows, None]).exp_()
        weights += logits.sub_(log_sums[tile.text_rank, 1, tile.columns]).exp_()
        if tile.is_diagonal:
            weights.diagonal().copy_(pairs[tile.rows])
        gradient.add(tile, weights)
    return loss, gradient.scaled(scale, 2 * len(positive))


def _siglip(
    batch: "_GlobalBatch", scale: Tensor, bias: Tensor, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    losses = scale.new_zeros(len(batch.own_images))
    bias_gradients = torch.zeros_like(losses)
    gradient = _FeatureGradient(batch) if with_gradient else None
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


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Some images of one rank, [c, E], and some texts of one rank, [d, E]."""

    images: Tensor
    texts: Tensor
    image_rank: int
    text_rank: int
    rows: slice
    columns: slice
    has_own_images: bool
    has_own_texts: bool

    @property
    def is_diagonal(self) -> bool:
        return self.image_rank == self.text_rank and self.rows == self.columns

    def logits(self, scale: Tensor) -> Tensor:
        return (self.images @ self.texts.T).to(scale.dtype).mul_(scale)  # [c, d]


class _GlobalBatch:
    """The features of all ranks, [R, B, E] of images and of texts, on each of them."""

    def __init__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        group: dist.ProcessGroup | None,
        chunk_size: int,
    ) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self.rank = self.group.rank() if self.group else 0
        self.chunk_size = chunk_size
        self.images, self.texts = image_features[None], text_features[None]
        if self.group:
            gathered = self.gather(torch.stack([image_features, text_features]))  # [R, 2, B, E]
            self.images, self.texts = gathered.unbind(1)

    @property
    def own_images(self) -> Tensor:
        return self.images[self.rank]

    @property
    def own_texts(self) -> Tensor:
        return self.texts[self.rank]

    def scalar(self, value: Tensor) -> Tensor:
        """One number in the type that sums are taken in, where the features are."""
        dtype = torch.promote_types(self.images.dtype, torch.float32)
        return value.reshape(()).to(self.images.device, dtype)

    def gather(self, local: Tensor) -> Tensor:
        """[...] of every rank -> [R, ...]."""
        if self.group is None:
            return local[None]
        gathered = local.new_empty(self.group.size() * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=self.group)
        return gathered.unflatten(0, (self.group.size(), len(local)))

    def tiles(self) -> Iterator[_Tile]:
        """All that hold an own image or an own text; those that hold both come once, and first."""
        peers = [rank for rank in range(len(self.images)) if rank != self.rank]
        blocks = [(self.rank, self.rank)]
        blocks += [(self.rank, peer) for peer in peers] + [(peer, self.rank) for peer in peers]
        starts = range(0, self.images.shape[1], self.chunk_size)
        chunks = [slice(start, start + self.chunk_size) for start in starts]
        for (image_rank, text_rank), rows, columns in product(blocks, chunks, chunks):
            yield _Tile(
                images=self.images[image_rank, rows],
                texts=self.texts[text_rank, columns],
                image_rank=image_rank,
                text_rank=text_rank,
                rows=rows,
                columns=columns,
                has_own_images=image_rank == self.rank,
                has_own_texts=text_rank == self.rank,
            )


class _FeatureGradient:
    """Sums up the gradients of this rank's features, tile by tile."""

    def __init__(self, batch: _GlobalBatch) -> None:
        self.batch = batch
        dtype = torch.promote_types(batch.images.dtype, torch.float32)
        self.images = torch.zeros_like(batch.own_images, dtype=dtype)
        self.texts = torch.zeros_like(batch.own_texts, dtype=dtype)

    def add(self, tile: _Tile, weights: Tensor) -> None:
        """Add what follows from the derivatives by the tile's logits, [c, d]."""
        weights = weights.to(tile.images.dtype)
        if tile.has_own_images:
            _add_product(self.images[tile.rows], weights, tile.texts)
        if tile.has_own_texts:
            _add_product(self.texts[tile.columns], weights.T, tile.images)

    def scaled(self, scale: Tensor, divisor: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of images, texts and logit scale, given that of ``divisor`` times the loss.

        That of the scale counts this rank's images against all texts: as the mean over the ranks,
        it is that of the global batch.
        """
        scale_gradient = _row_products(self.batch.own_images, self.images).sum() / divisor
        factor = scale / divisor
        return self.images.mul_(factor), self.texts.mul_(factor), scale_gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Scalar product of each row with its counterpart, in float32 or wider: [B, E] -> [B]."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.linalg.vecdot(left.to(dtype), right.to(dtype))


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradients were computed with it.

    They cost no more in the forward than in the backward, where the logits would have to be made
    again as well, and [B, E] of gradients replace the gathered [R, B, E] until then.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        pairs = zip(gradients, inputs, strict=True)
        ctx.save_for_backward(*(gradient.view(x.shape).to(x) for gradient, x in pairs))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would only notice where grad itself needs a gradient, and otherwise
        # let the gradients pass as constants into a wrong second derivative.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "clip_loss and siglip_loss can be differentiated once: "
                "create_graph (True) must be False"
            )
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad if need else None for gradient, need in needed)

"""Contrastive losses of the global batch, in memory that grows linearly with the batch.

Logits are computed in square tiles, never all at once. Every rank processes the tiles that contain
its own images or texts, so it obtains the complete gradient of its own features, and no gradients
have to be sent between ranks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

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
    return _loss(_clip, features | {"logit_scale": logit_scale}, group, chunk_size)


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
    return _loss(_siglip, features | scalars, group, chunk_size)


def num_tiles(pairs: int, num_ranks: int, chunk_size: int) -> int:
    """Return how many tiles a rank with ``pairs`` pairs of its own computes in either loss."""
    return (2 * num_ranks - 1) * math.ceil(pairs / chunk_size) ** 2


def _loss(
    compute: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    inputs: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    chunk_size: int,
) -> Tensor:
    """Compute a loss and, if needed, the gradients of all inputs with it."""
    _check(inputs, chunk_size)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values())
    images, texts, *scalars = inputs.values()
    # Autocast would take the logits to half precision; the meta device has no autocast.
    on_meta = images.device.type == "meta"
    with (
        torch.no_grad(),
        nullcontext() if on_meta else torch.autocast(images.device.type, enabled=False),
    ):
        batch = _GlobalBatch(images, texts, group, chunk_size)
        loss, gradients = compute(batch, *map(batch.scalar, scalars), needs_gradient)
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


def _clip(
    batch: "_GlobalBatch", scale: Tensor, with_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    positive = scale * _row_products(batch.own_images, batch.own_texts)  # [B]
    # Log-sum-exp of the negatives of every own image and text. The positive is kept apart, because
    # in a common sum the loss of a well classified pair would vanish in rounding.
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

    # d loss / d logits: the probability among the image's texts plus the probability among the
    # text's images, minus two for the pairs themselves.
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
    """A tile of the logits: some images of one rank, [c, E], and some texts of one rank, [d, E]."""

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
    """The features of all R ranks, [R, B, E] of images and of texts, on every rank."""

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
        self.own_images, self.own_texts = self.images[self.rank], self.texts[self.rank]

    def scalar(self, value: Tensor) -> Tensor:
        """Return one number in the dtype of sums, on the device of the features."""
        dtype = torch.promote_types(self.images.dtype, torch.float32)
        return value.reshape(()).to(self.images.device, dtype)

    def gather(self, local: Tensor) -> Tensor:
        """Gather a tensor [...] of every rank: [R, ...]."""
        if self.group is None:
            return local[None]
        gathered = local.new_empty(self.group.size() * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=self.group)
        return gathered.unflatten(0, (self.group.size(), len(local)))

    def tiles(self) -> Iterator[_Tile]:
        """Yield all tiles with an own image or own text; tiles with both come once, first."""
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
    """The gradients of this rank's features, summed tile by tile."""

    def __init__(self, batch: _GlobalBatch) -> None:
        self.batch = batch
        dtype = torch.promote_types(batch.images.dtype, torch.float32)
        self.images = torch.zeros_like(batch.own_images, dtype=dtype)
        self.texts = torch.zeros_like(batch.own_texts, dtype=dtype)

    def add(self, tile: _Tile, weights: Tensor) -> None:
        """Add the contribution of a tile, given the loss's derivatives by its logits, [c, d]."""
        weights = weights.to(tile.images.dtype)
        if tile.has_own_images:
            _add_product(self.images[tile.rows], weights, tile.texts)
        if tile.has_own_texts:
            _add_product(self.texts[tile.columns], weights.T, tile.images)

    def scaled(self, scale: Tensor, divisor: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of images, texts and logit scale of the loss, whose ``divisor``-fold
        was added up.

        The scale's gradient counts this rank's images against all texts; its mean over the ranks is
        the gradient of the global batch.
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
    """Return the scalar product of every row with its counterpart, in float32 or wider: [B]."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.linalg.vecdot(left.to(dtype), right.to(dtype))


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradients were computed together with it.

    In the forward they cost no more than in the backward, which would have to compute the logits
    again, and [B, E] of gradients are kept until then instead of the gathered [R, B, E].
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        pairs = zip(gradients, inputs, strict=True)
        ctx.save_for_backward(*(gradient.view(x.shape).to(x) for gradient, x in pairs))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would raise only if grad itself needs a gradient, and otherwise treat
        # the gradients as constants, which makes a second derivative wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "clip_loss and siglip_loss can be differentiated once: "
                "create_graph (True) must be False"
            )
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad if need else None for gradient, need in needed)

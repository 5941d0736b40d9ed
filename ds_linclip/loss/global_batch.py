"""The features of all ranks, tile by tile, and losses whose gradients are computed with them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FeatureGradient", "GlobalBatch", "Tile", "loss_of_global_batch", "row_products"]


def loss_of_global_batch(
    compute: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    inputs: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    chunk_size: int,
) -> Tensor:
    """Compute a loss of the global batch and, if needed, the gradients of all inputs with it.

    Args:
        compute: Takes the global batch, the scalars and whether gradients are needed; returns the
            loss of this rank's rows and the gradients of the inputs in their order, or ().
        inputs: By name: image features [B, E], text features [B, E], then numbers.
        group: The ranks whose rows form the global batch; None: this process alone.
        chunk_size: Side of the tiles of logits.

    Raises:
        ValueError: for arguments whose shapes, types or devices do not fit.
    """
    _check(inputs, chunk_size)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values())
    images, texts, *scalars = inputs.values()
    # Autocast would take the logits to half precision; the meta device has no autocast.
    on_meta = images.device.type == "meta"
    with (
        torch.no_grad(),
        nullcontext() if on_meta else torch.autocast(images.device.type, enabled=False),
    ):
        batch = GlobalBatch(images, texts, group, chunk_size)
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


@dataclass(frozen=True, kw_only=True)
class Tile:
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


class GlobalBatch:
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

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles with an own image or own text; tiles with both come once, first."""
        peers = [rank for rank in range(len(self.images)) if rank != self.rank]
        blocks = [(self.rank, self.rank)]
        blocks += [(self.rank, peer) for peer in peers] + [(peer, self.rank) for peer in peers]
        starts = range(0, self.images.shape[1], self.chunk_size)
        chunks = [slice(start, start + self.chunk_size) for start in starts]
        for (image_rank, text_rank), rows, columns in product(blocks, chunks, chunks):
            yield Tile(
                images=self.images[image_rank, rows],
                texts=self.texts[text_rank, columns],
                image_rank=image_rank,
                text_rank=text_rank,
                rows=rows,
                columns=columns,
                has_own_images=image_rank == self.rank,
                has_own_texts=text_rank == self.rank,
            )

    def log_sums(self, scale: Tensor, *, without_pairs: bool = False) -> Tensor:
        """Return the log-sum-exp of the logits of every own image and every own text, [2, B];
        optionally without the logits of the pairs themselves."""
        sums = scale.new_full((2, len(self.own_images)), -torch.inf)
        for tile in self.tiles():
            logits = tile.logits(scale)
            if without_pairs and tile.is_diagonal:
                logits.fill_diagonal_(-torch.inf)
            if tile.has_own_images:
                so_far = sums[0, tile.rows]
                torch.logaddexp(so_far, logits.logsumexp(1), out=so_far)
            if tile.has_own_texts:
                so_far = sums[1, tile.columns]
                torch.logaddexp(so_far, logits.logsumexp(0), out=so_far)
        return sums


class FeatureGradient:
    """The gradients of this rank's features, summed tile by tile."""

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        dtype = torch.promote_types(batch.images.dtype, torch.float32)
        self.images = torch.zeros_like(batch.own_images, dtype=dtype)
        self.texts = torch.zeros_like(batch.own_texts, dtype=dtype)

    def add(self, tile: Tile, weights: Tensor) -> None:
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
        scale_gradient = row_products(self.batch.own_images, self.images).sum() / divisor
        factor = scale / divisor
        return self.images.mul_(factor), self.texts.mul_(factor), scale_gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def row_products(left: Tensor, right: Tensor) -> Tensor:
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
                "losses of the global batch can be differentiated once: "
                "create_graph (True) must be False"
            )
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad if need else None for gradient, need in needed)

"""CLIP: an image and a text tower with a shared embedding space and a learned logit scale."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import ModelConfig
from ds_linclip.model.block import Block, Recompute
from ds_linclip.model.towers import TextTransformer, VisionTransformer
from ds_linclip.parallel.mesh import Mesh

__all__ = ["CLIP"]


class CLIP(nn.Module):
    """Contrastive image-text model (arXiv 2103.00020) with the attention of ``config``.

    The model is a sequence of units: embedding, blocks and head of the image tower, then of the
    text tower. A pipeline stage holds a range of them. All weights follow from one number drawn
    from torch's default CPU generator: with the same seed on all ranks they depend neither on the
    number of ranks nor on the split.

    Args:
        config: Both towers and the size of their shared space.
        mesh: The axes that split layers and tokens, and the device of the model.
        loss: Loss of the training; it sets the initial scale, and "sigmoid" adds a bias.
        units: Range within :meth:`num_units` that this process holds; None: all.

    Raises:
        ValueError: when heads or vocabulary do not divide by the tensor-parallel size.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        units: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        seed = int(torch.randint(2**40, (), device="cpu"))
        num_image, num_units = config.vision.layers + 2, self.num_units(config)
        units = range(num_units) if units is None else units
        image = range(units.start, min(units.stop, num_image))
        text = range(max(units.start - num_image, 0), units.stop - num_image)
        dim = config.embed_dim
        self.visual: VisionTransformer | None = None
        self.text: TextTransformer | None = None
        if image:
            self.visual = VisionTransformer(config.vision, dim, mesh, units=image, seed=seed)
        if text:
            self.text = TextTransformer(config.text, dim, mesh, units=text, seed=seed + num_image)
        self.is_last = units.stop == num_units
        if self.is_last:
            # One element, not a scalar: DeepSpeed cannot partition a tensor without dimensions.
            log_scale = math.log(10) if loss == "sigmoid" else math.log(1 / 0.07)
            self.logit_scale = nn.Parameter(torch.full((1,), log_scale))
            if loss == "sigmoid":
                self.logit_bias = nn.Parameter(torch.full((1,), -10.0))
        self._run: Callable[..., tuple[Tensor, ...]] = self._forward
        self.to(mesh.device)

    @staticmethod
    def num_units(config: ModelConfig) -> int:
        """Return the number of units of the whole model."""
        return config.vision.layers + 2 + config.text.layers + 2

    def num_tokens(self, images: Tensor, texts: Tensor) -> int:
        """Count the tokens of a training batch: images [B, 3, H, W] and texts [B, L]."""
        height, width = images.shape[2:]
        per_image = self.config.vision.num_kept_tokens_at((height, width))
        return len(images) * per_image + texts.numel()

    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """Return features [B, E] of images [B, 3, H, W]; with ``normalize`` fp32, length one."""
        assert self.visual is not None
        features = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, texts: Tensor, *, normalize: bool = False) -> Tensor:
        """Return features [B, E] of token ids [B, L] int64; with ``normalize`` fp32, length one."""
        assert self.text is not None
        features = self.text(texts)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, image: Tensor, texts: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Return normalized features, the log logit scale and, with the sigmoid loss, the bias.

        Args:
            image: Images [B, 3, H, W]; in a later pipeline stage the first output of the previous
                one.
            texts: Token ids [B, L] int64.
            more: In the first stage nothing, or indices [B, K] int64 of the patches to keep; in a
                later stage the further outputs of the previous one. Within the image tower these
                are, if its attention needs the grid: uint8 [rows, columns], for its shape, and the
                indices of the kept patches.

        Returns:
            Image features [B, E] and text features [B, E], fp32 of length one; the logarithm of the
            logit scale [1]; with the sigmoid loss the logit bias [1]. An earlier stage returns the
            arguments of the next one.
        """
        return self._run(image, texts, *more)

    def _forward(self, image: Tensor, texts: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        if self.visual is not None:
            image, more = self._run_visual(self.visual, image, *more)
        if self.text is not None:
            more = (self.text(texts, *more),)
        if not self.is_last:
            return image, texts, *more
        (text,) = more
        features = (F.normalize(x.float(), dim=-1) for x in (image, text))
        # Views: DeepSpeed clears 16-bit gradients at the first output that is no parameter itself,
        # which would be after those of scale and bias are there.
        return *features, *(p.view(1) for p in self.logit_parameters())

    @staticmethod
    def _run_visual(
        visual: VisionTransformer, x: Tensor, *more: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return features or tokens, and with tokens what :meth:`forward` passes on."""
        patches = None
        if visual.has_embedding:
            patches = visual.grid(x, *more)
        elif more:
            grid, *kept = more
            patches = visual.places(*grid.shape, *kept)
        features = visual(x, patches)
        if visual.has_head or patches is None or not visual.needs_grid:
            return features, ()
        rows, columns, kept_patches, _ = patches
        grid = torch.zeros(rows, columns, dtype=torch.uint8, device=x.device)
        return features, (grid,) if kept_patches is None else (grid, kept_patches)

    def logit_parameters(self) -> list[nn.Parameter]:
        """Return the logarithm of the logit scale and, with the sigmoid loss, the logit bias, [1]
        each, if this process holds them."""
        return list(self.parameters(recurse=False))

    def recompute_activations(self, what: Recompute) -> None:
        """Set which activations the backward of every block recomputes; see :class:`Block`."""
        for block in self._blocks():
            block.recompute = what

    def choose_backend(self, backend: Literal["auto", "torch", "triton"]) -> None:
        """Set the backend of linear attention in every block; see :class:`SelfAttention`."""
        for block in self._blocks():
            block.attn.backend = backend

    def compute_in(self, dtype: torch.dtype) -> None:
        """Run matrix products and attention in ``dtype``, whatever the dtype of the weights.

        Norms and the sum of residuals stay in the dtype of the weights. The casts are written out
        where autocast would make them, which megatron's layers do not honour on a CPU.
        """
        for module in self.modules():
            if hasattr(module, "compute_dtype"):
                vars(module)["compute_dtype"] = dtype

    def compile_blocks(self) -> None:
        """torch.compile every block, in place."""
        for block in self._blocks():
            block.compile_layers()

    def compile_towers(self, **options: Any) -> None:
        """torch.compile what :meth:`forward` computes, inside of DeepSpeed's hooks on the module.

        :meth:`encode_image` and :meth:`encode_text` stay as they are: the batches of an evaluation
        have many sizes.
        """
        self._run = torch.compile(self._forward, **options)

    def run_instead(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        """Compute in :meth:`forward` something else; encoding stays as it is."""
        self._run = compute

    def _blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

"""Random choice of the patches that each training image keeps (FLIP, arXiv 2212.00794)."""

import torch
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh

__all__ = ["kept_patches", "model_inputs"]

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX = (-4658895280553007687, -7723592293110705685)  # of splitmix64


def model_inputs(
    images: Tensor, texts: Tensor, number: int, config: Config, mesh: Mesh
) -> tuple[Tensor, ...]:
    """Return the model's arguments for a training batch: images [B, 3, H, W], texts [B, L] and,
    with patch dropout, the patches to keep [B, K] int64.

    ``number`` is the position of the global batch in the order of the data.
    """
    vision = config.model.vision
    if vision.patch_dropout == 0 or mesh.pp.rank > 0:
        return images, texts
    height, width = images.shape[2:]
    first = number * config.train.global_batch_size + mesh.dp.rank * len(images)
    kept = kept_patches(
        torch.arange(first, first + len(images), device=mesh.device),
        num_patches=vision.num_patches_at((height, width)),
        num_kept=vision.num_kept_patches_at((height, width)),
        seed=config.train.seed,
    )
    return images, texts, kept


def kept_patches(samples: Tensor, *, num_patches: int, num_kept: int, seed: int) -> Tensor:
    """Choose random patches for every sample, as a function of the sample's number and the seed.

    No generator is used, so the choice is the same on tensor-, context- and pipeline-parallel
    ranks, in both passes over a micro-batch, in recomputed activations, after a resume and on any
    number of ranks.

    Args:
        samples: Numbers [B] int64, different for all samples of the run.
        num_patches: Patches of an image.
        num_kept: Patches to keep.
        seed: Seed of the run.

    Returns:
        Ascending indices [B, num_kept] int64, on the device of ``samples``.
    """
    patches = torch.arange(num_patches, device=samples.device)
    offset = (seed * _GOLDEN + 2**63) % 2**64 - 2**63  # wrapped around as int64 does
    noise = _mix(_mix(samples + offset)[:, None] + patches)  # [B, num_patches]
    return noise.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def _mix(x: Tensor) -> Tensor:
    """Apply splitmix64's finalizer, a pseudo-random bijection of 64 bits; int64 wraps around."""
    x = x * _GOLDEN
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; ``>>`` alone would repeat the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

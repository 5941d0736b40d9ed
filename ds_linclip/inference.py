"""The model that is evaluated: this project's or open_clip's, behind one pair of encoders."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from ds_linclip.checkpoint.loading import latest_checkpoint, load_weights
from ds_linclip.checkpoint.sharded_safetensors import MANIFEST
from ds_linclip.data import EvalTransform
from ds_linclip.interop.state_dict import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_folder,
    read_config,
)
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["PRECISIONS", "EvalModel", "load_model"]

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
#: Dtypes of weights and images.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """A model in eval mode, without gradients, and how its inputs are made.

    Attributes:
        name: What the user called it; of a run folder, with its checkpoint.
        module: ds_linclip's CLIP, or a model of open_clip.
        image_size: (height, width) in pixels that ``transform`` gives.
        tokenizer: Texts to token ids [B, context_length] int64.
        transform: Image file to [3, height, width].
        dtype: Of the weights.
        device: Where they are.
        fingerprint: SHA-256 of architecture, weights and dtype, by which results are kept apart.
    """

    name: str
    module: nn.Module
    image_size: tuple[int, int]
    tokenizer: Callable[[list[str]], Tensor]
    transform: EvalTransform
    dtype: torch.dtype
    device: torch.device
    fingerprint: str

    @property
    def title(self) -> str:
        """The name in short: of a run folder, or the last part of a path."""
        path = Path(self.name)
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Features [B, E] of images [B, 3, H, W] from any device; not normalised."""
        images = images.to(self.device, self.dtype, non_blocking=True)
        features: Tensor = self._encoder("encode_image")(images)
        return features

    @torch.no_grad()
    def encode_text(self, texts: Tensor) -> Tensor:
        """Features [B, E] of token ids [B, L] from any device; not normalised."""
        features: Tensor = self._encoder("encode_text")(texts.to(self.device, non_blocking=True))
        return features

    def _encoder(self, name: str) -> Callable[[Tensor], Tensor]:
        encoder: Callable[[Tensor], Tensor] = getattr(self.module, name)
        return encoder


def load_model(
    source: str | Path,
    mesh: Mesh,
    *,
    precision: Precision = "fp32",
    image_size: int | None = None,
) -> EvalModel:
    """Open a model for evaluation, whole on every rank; all ranks of ``mesh`` call it together.

    Args:
        source: A run folder (its newest checkpoint), one of its checkpoints, a hub folder of this
            project or of open_clip, or open_clip's ``NAME:TAG``. ``NAME`` alone has random weights,
            the same ones every time.
        mesh: Where to put it; no tensor or pipeline parallelism.
        precision: Dtype of weights and images.
        image_size: Side in pixels to run at, with the positions resampled; None: the model's own.

    Raises:
        ValueError: when there is no such model, it cannot be read, or the image size does not fit.
    """
    if mesh.tp.size * mesh.pp.size * mesh.cp.size > 1:
        raise ValueError("parallel (tp, pp, cp) must be 1: evaluation takes whole models")
    # One rank chooses: a run that goes on may have a newer checkpoint a moment later.
    name = mesh.from_rank_zero(partial(_resolve, str(source)))
    opened = partial(_open, name, mesh, PRECISIONS[precision], image_size)
    return mesh.agree(opened, errors=(ValueError, OSError))


def _resolve(source: str) -> str:
    """Of a run folder its newest checkpoint; anything else is what it is."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).exists() for name in (CONFIG_FILE, MANIFEST)):
        return source
    return str(latest_checkpoint(folder))


def _open(name: str, mesh: Mesh, dtype: torch.dtype, side: int | None) -> EvalModel:
    folder = Path(name)
    if not folder.is_dir():
        return _from_open_clip(name, mesh, dtype, side)
    if (folder / MANIFEST).exists():
        return _from_ours(load_weights(folder, mesh), name, dtype, side, {})
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        read_config(folder)
    except ValueError as error:
        logger.info("%s: left to open_clip: %s", folder, error)
        return _from_open_clip(f"local-dir:{folder}", mesh, dtype, side)
    if not (folder / WEIGHTS_FILE).exists():
        return _from_open_clip(f"local-dir:{folder}", mesh, dtype, side)
    preprocess = content.get("preprocess_cfg") or {}
    return _from_ours(load_folder(folder, mesh), name, dtype, side, preprocess)


def _from_ours(
    module: CLIP,
    name: str,
    dtype: torch.dtype,
    side: int | None,
    preprocess: Mapping[str, Any],
) -> EvalModel:
    vision, text = module.config.vision, module.config.text
    image_size = vision.image_size if side is None else (side, side)
    if any(length % vision.patch_size or length < 1 for length in image_size):
        raise ValueError(
            f"image_size ({side}) must be a positive multiple of patch_size ({vision.patch_size})"
        )
    module = module.to(dtype).eval().requires_grad_(False)
    return EvalModel(
        name=name,
        module=module,
        image_size=image_size,
        tokenizer=open_clip.SimpleTokenizer(context_length=text.context_length),
        transform=EvalTransform(
            PreprocessCfg(
                **merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": image_size})
            )
        ),
        dtype=dtype,
        device=module.mesh.device,
        fingerprint=_fingerprint(module, repr(module.config)),
    )


def _from_open_clip(name: str, mesh: Mesh, dtype: torch.dtype, side: int | None) -> EvalModel:
    architecture, _, tag = name.partition(":")
    is_folder = architecture == "local-dir"
    if not is_folder and architecture not in open_clip.list_models():
        raise ValueError(
            f"model ({name}) must be a run folder, a hub folder, or NAME[:TAG] of open_clip"
        )
    try:
        # Random weights where there is no tag; those of the caller stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = open_clip.create_model(
                name if is_folder else architecture,
                pretrained=None if is_folder else tag or None,
                force_image_size=side,
                device="cpu",
                require_pretrained=is_folder or bool(tag),
            )
        tokenizer = open_clip.get_tokenizer(name if is_folder else architecture)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError, SafetensorError) as error:
        raise ValueError(f"model ({name}): open_clip cannot open it: {error}") from error
    module = module.to(mesh.device, dtype).eval().requires_grad_(False)
    if is_folder:
        architecture_config = (Path(tag) / CONFIG_FILE).read_text(encoding="utf-8")
    else:
        architecture_config = repr(open_clip.get_model_config(architecture))
    preprocess = PreprocessCfg(**module.visual.preprocess_cfg)
    _, height, width = preprocess.input_size
    return EvalModel(
        name=name,
        module=module,
        image_size=(height, width),
        tokenizer=tokenizer,
        transform=EvalTransform(preprocess),
        dtype=dtype,
        device=mesh.device,
        fingerprint=_fingerprint(module, architecture_config),
    )


def _fingerprint(module: nn.Module, architecture: str) -> str:
    """Weights alone do not tell models apart: attention has none of its own."""
    digest = hashlib.sha256(architecture.encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # Megatron's layers carry an extra state of their own
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()

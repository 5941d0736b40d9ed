"""Load a trained model and encode images and texts with it.

::

    model = load_model("runs/my_run")
    images = torch.stack([model.transform(path.read_bytes()) for path in paths])
    texts = model.tokenizer(["a photo of a dog", "a photo of a cat"])
    cosines = model.similarity(images, texts)  # [B, 2]
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.checkpoint.finite_weights import check_finite
from ds_linclip.checkpoint.loading import latest_checkpoint, load_weights
from ds_linclip.checkpoint.sharded_safetensors import MANIFEST
from ds_linclip.data import CaptionTokenizer, EvalTransform
from ds_linclip.interop.hub_folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from ds_linclip.interop.key_mapping import SCALARS
from ds_linclip.interop.state_dict import load_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["PRECISIONS", "LoadedModel", "Precision", "load_model"]

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
#: Precision -> dtype of weights and images.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in eval mode, with the transform and the tokenizer that its inputs need.

    Attributes:
        name: The source of the model; for a run folder, its newest checkpoint.
        module: ds_linclip's CLIP, or a model of open_clip.
        image_size: The (height, width), in pixels, of the images that ``transform`` returns.
        tokenizer: Maps a list of texts to token ids [B, context_length], int64.
        transform: Maps the bytes of an image file to an image [3, height, width], normalised.
        dtype: The dtype of the weights.
        device: The device of the weights.
        fingerprint: SHA-256 of architecture, weights and dtype; it identifies cached results.
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
        """A short name: that of the run folder, or the last part of the source."""
        path = Path(self.name)
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return the features [B, E], not normalised, of images [B, 3, H, W] from any device."""
        images = images.to(self.device, self.dtype, non_blocking=True)
        return self._encode("encode_image", images)

    @torch.no_grad()
    def encode_text(self, texts: Tensor) -> Tensor:
        """Return the features [B, E], not normalised, of token ids [B, L] from any device."""
        return self._encode("encode_text", texts.to(self.device, non_blocking=True))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines [B, T] of images [B, 3, H, W] and token ids [T, L] from any device."""
        image_features = F.normalize(self.encode_image(images).float(), dim=-1)
        text_features = F.normalize(self.encode_text(texts).float(), dim=-1)
        return image_features @ text_features.T

    def _encode(self, encoder: str, inputs: Tensor) -> Tensor:
        features: Tensor = getattr(self.module, encoder)(inputs)
        return features


def load_model(
    source: str | Path,
    mesh: Mesh | None = None,
    *,
    precision: Precision = "fp32",
    image_size: int | None = None,
) -> LoadedModel:
    """Load a model for inference, whole on every rank.

    Args:
        source: A run folder (its newest checkpoint is taken), a checkpoint, a hub folder of this
            project or of open_clip, or open_clip's ``NAME:TAG``. A ``NAME`` alone has random
            weights, the same ones every time.
        mesh: The ranks that load the model together, without tensor, context or pipeline
            parallelism; None: the processes of the launcher, or this process alone.
        precision: The dtype of weights and images; logit scale and bias are always fp32.
        image_size: The side of the images in pixels; position embeddings are resampled to it. None:
            the size that the model was trained on.

    Raises:
        ValueError: on all ranks, when there is no such model, it cannot be read, a weight is not
            finite, or the image size does not fit.
    """
    mesh = mesh or Mesh.create()
    if mesh.tp.size * mesh.pp.size * mesh.cp.size > 1:
        raise ValueError("parallel (tp, pp, cp) must be 1: inference takes whole models")
    # One rank resolves the name: an unfinished run may save a newer checkpoint in between.
    name = mesh.from_rank_zero(partial(_resolve, os.path.expanduser(source)))
    load = partial(_load, name, mesh, PRECISIONS[precision], image_size)
    return mesh.agree(load, errors=(ValueError, OSError))


def _resolve(source: str) -> str:
    """Return the newest checkpoint of a run folder; any other source is returned as it is."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).exists() for name in (CONFIG_FILE, MANIFEST)):
        return source
    return str(latest_checkpoint(folder))


class _Parts(NamedTuple):
    """A model of either origin before it is moved and cast; ``architecture`` describes it."""

    module: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: PreprocessCfg
    architecture: str


def _load(name: str, mesh: Mesh, dtype: torch.dtype, side: int | None) -> LoadedModel:
    parts = _load_parts(name, mesh, side)
    named = parts.module.named_parameters()
    # In bf16 the scale of the logits would change by a percent.
    scalars = {p: p.data.to(mesh.device) for key, p in named if key in SCALARS}
    module = parts.module.to(mesh.device, dtype).eval().requires_grad_(False)
    for p, value in scalars.items():
        p.data = value
    weights = module.state_dict().items()
    try:
        # After the cast, which makes what exceeds fp16 infinite; not Megatron's extra state.
        check_finite((key, value) for key, value in weights if isinstance(value, Tensor))
    except ValueError as error:
        raise ValueError(f"model ({name}) in {dtype}: {error}") from error
    _, height, width = parts.preprocess.input_size
    return LoadedModel(
        name=name,
        module=module,
        image_size=(height, width),
        tokenizer=parts.tokenizer,
        transform=EvalTransform(parts.preprocess),
        dtype=dtype,
        device=mesh.device,
        fingerprint=_fingerprint(module, parts.architecture),
    )


def _load_parts(name: str, mesh: Mesh, side: int | None) -> _Parts:
    folder = Path(name)
    if not folder.is_dir():
        return _from_open_clip(name, side)
    if (folder / MANIFEST).exists():
        return _from_clip(load_weights(folder, mesh), side, {})
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes())
        read_config(folder)
    except ValueError as error:
        logger.info("%s: loaded by open_clip: %s", folder, error)
    else:
        if (folder / WEIGHTS_FILE).exists():
            return _from_clip(load_folder(folder, mesh), side, content.get("preprocess_cfg") or {})
    return _from_open_clip(f"local-dir:{folder}", side)


def _from_clip(module: CLIP, side: int | None, preprocess: dict[str, object]) -> _Parts:
    vision, text = module.config.vision, module.config.text
    image_size = vision.image_size if side is None else (side, side)
    if any(length % vision.patch_size or length < 1 for length in image_size):
        raise ValueError(
            f"image_size ({side}) must be a positive multiple of patch_size ({vision.patch_size})"
        )
    merged = merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": image_size})
    tokenizer = CaptionTokenizer(text.context_length)
    return _Parts(module, tokenizer, PreprocessCfg(**merged), repr(module.config))


def _from_open_clip(name: str, side: int | None) -> _Parts:
    architecture, _, tag = name.partition(":")
    is_folder = architecture == "local-dir"  # whose tag is the folder
    source = name if is_folder else architecture
    if not is_folder and architecture not in open_clip.list_models():
        raise ValueError(
            f"model ({name}) must be a run folder, a hub folder, or NAME[:TAG] of open_clip"
        )
    try:
        # A model without a tag has random weights; the caller's generator stays as it is.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = open_clip.create_model(
                source,
                pretrained=None if is_folder else tag or None,
                force_image_size=side,
                device="cpu",
                require_pretrained=bool(tag),
            )
        tokenizer = open_clip.get_tokenizer(source)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError, SafetensorError) as error:
        raise ValueError(f"model ({name}): open_clip cannot open it: {error}") from error
    if is_folder:
        description = (Path(tag) / CONFIG_FILE).read_text(encoding="utf-8")
    else:
        description = repr(open_clip.get_model_config(architecture))
    return _Parts(module, tokenizer, PreprocessCfg(**module.visual.preprocess_cfg), description)


def _fingerprint(module: nn.Module, architecture: str) -> str:
    """Hash weights and architecture: models with different attention may share their weights."""
    digest = hashlib.sha256(architecture.encode())
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):  # not the extra state of Megatron's layers
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content.data)
    return digest.hexdigest()

"""Bytes -> image tensor and token ids, with every input limited before it costs anything.

The transforms and the tokenizer are open_clip's. Pixels are decoded by Pillow from an allow-list of
formats; nothing else in a shard is ever interpreted.
"""

import io
import struct
import zlib
from typing import cast

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image, ImageOps
from torch import Tensor

from ds_linclip.data.shards import BadSample

__all__ = [
    "MAX_IMAGE_BYTES",
    "MAX_TEXT_BYTES",
    "CaptionTokenizer",
    "ImageDecoder",
    "decode_image",
    "decode_text",
]

MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 64 * 2**10
MAX_PIXELS = 8192 * 8192
MIN_SIDE = 4

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# What Pillow's plugins raise for broken files of these formats.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# A merge of a word is quadratic in its length. No natural text needs more characters per token.
_CHARACTERS_PER_TOKEN = 16
_MAX_CACHED_WORDS = 200_000


class ImageDecoder:
    """Image file -> model input, with open_clip's transforms.

    Args:
        image_size: Side of the square image in pixels.
        crop_scale: Area range of the random resized crop; None: the evaluation transform.
    """

    def __init__(self, image_size: int, *, crop_scale: tuple[float, float] | None) -> None:
        augmentation = None if crop_scale is None else AugmentationCfg(scale=crop_scale)
        self._transform = image_transform(
            image_size, is_train=crop_scale is not None, aug_cfg=augmentation
        )

    def __call__(self, content: bytes, *, seed: int = 0) -> Tensor:
        """Decode, crop and normalise; the crop depends on ``seed`` only.

        Returns:
            [3, image_size, image_size] float32, normalised with open_clip's mean and deviation.

        Raises:
            BadSample: see :func:`decode_image`.
        """
        image = decode_image(content)
        # torchvision draws from the global generator; it is given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cast(Tensor, self._transform(image))


class CaptionTokenizer:
    """Caption -> open_clip's token ids, in bounded time and memory.

    Args:
        context_length: Token ids per caption.
    """

    def __init__(self, context_length: int) -> None:
        self._tokenizer = SimpleTokenizer(context_length=context_length)
        self._special_tokens = dict(self._tokenizer.cache)
        self._max_characters = _CHARACTERS_PER_TOKEN * context_length

    def __call__(self, caption: str) -> Tensor:
        """Token ids [context_length] int64."""
        if len(self._tokenizer.cache) > _MAX_CACHED_WORDS:  # it keeps every word it meets
            self._tokenizer.cache = dict(self._special_tokens)
        text = " ".join(caption.split())[: self._max_characters]
        return cast(Tensor, self._tokenizer(text)[0])


def decode_image(content: bytes) -> Image.Image:
    """Decode into RGB: rotated as EXIF says, transparency over white, 16-bit grey rescaled.

    Raises:
        BadSample: ``image_undecodable``, ``image_too_many_pixels`` (known from the header, nothing
            is decoded) or ``image_too_small``.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_many_pixels") from error
    except _DECODE_ERRORS as error:
        raise BadSample("image_undecodable") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("image_too_many_pixels")
    if min(image.size) < MIN_SIDE:
        raise BadSample("image_too_small")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise BadSample("image_undecodable") from error


def decode_text(content: bytes) -> str:
    """Decode a caption.

    Raises:
        BadSample: ``text_not_utf8`` or ``text_empty``.
    """
    try:
        caption = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8") from error
    if not caption:
        raise BadSample("text_empty")
    return caption


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257.0  # 65535 -> 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

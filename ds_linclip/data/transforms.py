"""Decoding of images, with limits that are checked before an input costs anything.

The evaluation transform and the normalization are open_clip's. Pillow decodes an
allow-list of image formats; plain JPEGs, nearly all of a training set, are decoded by libjpeg-turbo
directly, to the same pixels. Nothing else in a shard is interpreted.
"""

import io
import itertools
import math
import random
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import simplejpeg
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.data.tar_index import BadSample

__all__ = [
    "MAX_IMAGE_BYTES",
    "EvalTransform",
    "Normalizer",
    "TrainTransform",
    "decode_image",
    "open_image",
]

MAX_IMAGE_BYTES = 64 * 2**20
MAX_PIXELS = 8192 * 8192
MIN_SIDE = 4
_MAX_PIXELS_OF_OTHER_JPEGS = 8192 * 4096  # may need a rotated copy, four bytes per pixel
_MAX_PIXELS_OF_OTHERS = 4096 * 4096  # a few kB may decompress slowly to any size
_MAX_SCANS = 100  # each passes over the whole image; encoders write about ten

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# Exceptions of Pillow's plugins for broken files of these formats.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# A marker that is followed by a segment, or the end marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_STRIP_PIXELS = 2**20
# Decoding at half the size saves less time than Pillow takes to resize, which reads between pixels.
_MIN_REDUCTION = 4
# torchvision's default range of aspect ratios, 3/4 to 4/3.
_LOG_RATIO = math.log(4 / 3)


class EvalTransform:
    """open_clip's evaluation transform, from image file to model input.

    Args:
        preprocess: Size in pixels, statistics and resize mode. Training here uses open_clip's
            defaults.
    """

    def __init__(self, preprocess: PreprocessCfg) -> None:
        self.preprocess = preprocess
        self._transform = image_transform_v2(preprocess, is_train=False)

    def __call__(self, content: bytes) -> Tensor:
        """Decode, resize, crop the center and normalize.

        Returns:
            [3, height, width] float32.

        Raises:
            BadSample: see :func:`decode_image`.
        """
        return cast(Tensor, self._transform(decode_image(content)))


class TrainTransform:
    """Random resized crop of an image file, distributed as torchvision's, as uint8.

    The crop is drawn from the size in the header, before decoding. A JPEG is then decoded at a
    quarter or an eighth of its size if the crop still has at least the pixels of the result.

    Args:
        crop_scale: (smallest, largest) area of the crop as a fraction of the image.
        seed: Seed of all crops.
    """

    def __init__(self, crop_scale: tuple[float, float], *, seed: int) -> None:
        self._crop_scale = crop_scale
        self._seed = seed

    def __call__(self, content: bytes, image_size: tuple[int, int], position: int) -> Tensor:
        """Decode, crop and resize (bicubic, antialiased).

        Args:
            content: Content of the image file.
            image_size: (height, width) of the result in pixels.
            position: Position of the sample in the order; the crop depends on it and the seed only.

        Returns:
            [3, height, width] uint8, channels last in memory.

        Raises:
            BadSample: see :func:`decode_image`.
        """
        image = open_image(content)
        rng = random.Random((self._seed << 64) + position)
        pixels: np.ndarray
        if _is_plain_jpeg(image):
            box = _random_crop(image.height, image.width, self._crop_scale, rng)
            pixels = _decode_jpeg(content, image, box, image_size)
            if pixels.shape[:2] != (image.height, image.width):
                return _resize_reduced(pixels, image, box, image_size)
            pixels = np.ascontiguousarray(pixels[box.top : box.bottom, box.left : box.right])
        else:
            _load(image)
            box = _random_crop(image.height, image.width, self._crop_scale, rng)
            pixels = _rgb_pixels(image, box)
        # As a channels-last batch of one, for which torch has a faster kernel.
        crop = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        return F.interpolate(crop, image_size, mode="bicubic", antialias=True)[0]


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB: EXIF rotation applied, transparency over white, 16-bit gray rescaled.

    Raises:
        BadSample: ``image_undecodable``, or, before anything is decoded,
            ``image_too_many_pixels``, ``image_too_many_scans`` or ``image_too_small``.
    """
    image = open_image(content)
    _load(image)
    if _is_rgb(image):
        return image
    rgb = Image.new("RGB", image.size)
    for top, strip in _rgb_strips(image, _Box(0, 0, image.height, image.width)):
        rgb.paste(strip, (0, top))
    return rgb


class Normalizer:
    """Normalization of whole batches on a device with open_clip's mean and standard deviation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # On a CPU a few images at a time, so that they stay in its cache.
        self._bytes_at_once = 2**18 if device.type == "cpu" else 2**62
        # Copied once: a copy from pageable memory to a GPU waits for all of its work.
        self._mean, self._deviation = (
            (255 * torch.tensor(values)).view(3, 1, 1).to(device)
            for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        )

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Return one normalized batch on the device; asynchronous from pinned memory.

        Args:
            parts: Parts of the batch, [B_i, 3, H, W] uint8.

        Returns:
            [B, 3, H, W] float32, where B is the sum of all B_i.
        """
        images = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), device=self._device)
        first = 0
        for part in parts:
            part = part.to(self._device, non_blocking=True)
            rows = images[first : first + len(part)]
            at_once = max(1, self._bytes_at_once // part[0].numel())
            for row, pixels in zip(rows.split(at_once), part.split(at_once), strict=True):
                row.copy_(pixels).sub_(self._mean).div_(self._deviation)
            first += len(part)
        return images


def open_image(content: bytes) -> Image.Image:
    """Read an image's header and check the limits, without decoding pixels.

    Raises:
        BadSample: as :func:`decode_image`.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_many_pixels") from error
    except _DECODE_ERRORS as error:
        raise BadSample("image_undecodable") from error
    num_pixels = image.width * image.height
    limit = _MAX_PIXELS_OF_OTHERS
    if isinstance(image, JpegImageFile):
        if _has_one_scan(content, image):
            limit = MAX_PIXELS if _is_plain_jpeg(image) else _MAX_PIXELS_OF_OTHER_JPEGS
        elif _has_too_many_scans(content):
            raise BadSample("image_too_many_scans")
    if num_pixels > limit:
        raise BadSample("image_too_many_pixels")
    if min(image.size) < MIN_SIDE:
        raise BadSample("image_too_small")
    return image


def _has_one_scan(content: bytes, image: JpegImageFile) -> bool:
    """Return whether a JPEG is decoded row by row, without keeping all coefficients in memory."""
    if "progressive" in image.info or image.fp is None:
        return False
    header = b"\xff\xda\0" + bytes((2 * image.layers + 6, image.layers))  # all color components
    # Pillow has just read the first scan header, except in some formats built on JPEG.
    if content.startswith(header, max(0, image.fp.tell() - 2 * image.layers - 8)):
        return True
    return content.startswith(header, next(_scans(content), len(content)))


def _has_too_many_scans(content: bytes) -> bool:
    if content.count(b"\xff\xda") <= _MAX_SCANS:
        return False
    return next(itertools.islice(_scans(content), _MAX_SCANS, None), None) is not None


def _scans(content: bytes) -> Iterator[int]:
    """Yield the offsets of the scans of a JPEG, found as libjpeg finds them."""
    found = _JPEG_MARKER.search(content)
    while found and found[0] != b"\xff\xd9":
        if found[0] == b"\xff\xda":
            yield found.start()
        length = int.from_bytes(content[found.end() : found.end() + 2], "big")
        found = _JPEG_MARKER.search(content, found.end() + max(length, 2))


def _load(image: Image.Image) -> None:
    """Decode in place, and apply the rotation in EXIF or XMP."""
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except _DECODE_ERRORS as error:
        raise BadSample("image_undecodable") from error


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether libjpeg gives Pillow's pixels; EXIF and XMP may ask for a rotation."""
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and "exif" not in image.info
        and "xmp" not in image.info
    )


def _decode_jpeg(
    content: bytes, image: Image.Image, box: "_Box", image_size: tuple[int, int]
) -> np.ndarray:
    """Return pixels [h, w, 3] of the whole image, reduced as far as the crop allows."""
    height, width = image_size
    try:
        return simplejpeg.decode_jpeg(
            content,
            "RGB",
            min_height=math.ceil(image.height * height / (box.bottom - box.top)),
            min_width=math.ceil(image.width * width / (box.right - box.left)),
            min_factor=_MIN_REDUCTION,
        )
    except ValueError:  # simplejpeg is stricter than Pillow, which decides
        _load(image)
        return _rgb_pixels(image, _Box(0, 0, image.height, image.width))


def _resize_reduced(
    pixels: np.ndarray, image: Image.Image, box: "_Box", image_size: tuple[int, int]
) -> Tensor:
    """Resize a crop, given in pixels of the whole image, of one that libjpeg has reduced.

    Every 8 pixels have become k, and what is left at the end the next whole number. So the ends of
    the crop lie between pixels of the reduced image, where Pillow can begin and end.
    """
    k = 8 * max(pixels.shape[:2]) // max(image.size)
    top, left, bottom, right = (end * k / 8 for end in box)
    y, x = int(top), int(left)
    part = Image.fromarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
    part = part.resize(
        image_size[::-1], Image.Resampling.BICUBIC, (left - x, top - y, right - x, bottom - y)
    )
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


class _Box(NamedTuple):
    top: int
    left: int
    bottom: int
    right: int


def _random_crop(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> _Box:
    """Draw a crop as torchvision's RandomResizedCrop does, with its default aspect ratios."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = math.exp(_LOG_RATIO * (2 * rng.random() - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int((height - h + 1) * rng.random())
            left = int((width - w + 1) * rng.random())
            return _Box(top, left, top + h, left + w)
    w = min(width, round(height * math.exp(_LOG_RATIO)))
    h = min(height, round(width * math.exp(_LOG_RATIO)))
    top, left = (height - h) // 2, (width - w) // 2
    return _Box(top, left, top + h, left + w)


def _rgb_pixels(image: Image.Image, box: _Box) -> np.ndarray:
    """Return pixels [h, w, 3] of a part of a decoded image."""
    pixels = np.empty((box.bottom - box.top, box.right - box.left, 3), np.uint8)
    for top, strip in _rgb_strips(image, box):
        pixels[top : top + strip.height] = np.asarray(strip)
    return pixels


def _rgb_strips(image: Image.Image, box: _Box) -> Iterator[tuple[int, Image.Image]]:
    """Yield a part of a decoded image in RGB strips, so that conversions need little memory."""
    num_rows = max(1, _STRIP_PIXELS // (box.right - box.left))
    for top in range(box.top, box.bottom, num_rows):
        strip = image.crop((box.left, top, box.right, min(top + num_rows, box.bottom)))
        try:
            yield top - box.top, _to_rgb(strip)
        except _DECODE_ERRORS as error:
            raise BadSample("image_undecodable") from error


def _is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and "transparency" not in image.info


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_rgb(image):
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        grey = (grey + 128) // 257  # 65535 -> 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

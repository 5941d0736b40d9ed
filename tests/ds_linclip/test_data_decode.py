"""Every kind of image becomes the same RGB picture; the rest is rejected in time."""

import io
import itertools
import struct
import time
import zlib

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image

from ds_linclip.data.decode import (
    CaptionTokenizer,
    ImageDecoder,
    decode_image,
    decode_text,
)
from ds_linclip.data.shards import BadSample


def encode(image: Image.Image, file_format: str, **arguments: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **arguments)
    return buffer.getvalue()


def gradient() -> Image.Image:
    ramp = np.linspace(0, 255, 16 * 24).reshape(16, 24)
    return Image.fromarray(np.stack([ramp, ramp[::-1], ramp], axis=-1).astype(np.uint8))


def cause_of(content: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(content)
    return caught.value.cause


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *itertools.product(["PNG", "WEBP", "GIF", "JPEG"], ["RGB", "L"]),
        *itertools.product(["PNG", "GIF"], ["P"]),  # the others have no palette
    ],
)
def test_modes_and_formats_become_rgb(file_format: str, mode: str) -> None:
    source = gradient().convert(mode)
    arguments = {"lossless": True} if file_format == "WEBP" else {}
    image = decode_image(encode(source, file_format, **arguments))
    assert image.mode == "RGB"
    expected = np.asarray(source.convert("RGB"), dtype=float)
    error = np.abs(np.asarray(image, dtype=float) - expected).mean()
    assert error <= {"JPEG": 6, "GIF": 8}.get(file_format, 0)


def test_cmyk_becomes_rgb() -> None:
    image = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 40


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = np.asarray(decode_image(encode(image, "PNG")))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[0, 7].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    pixels = np.asarray(decode_image(encode(palette, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_rescaled() -> None:
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(grey), "PNG")), dtype=float)
    assert np.abs(pixels[..., 0] - grey / 257).max() <= 0.5


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = decode_image(encode(gradient(), "JPEG", exif=exif))
    assert image.size == (16, 24)


def test_broken_images_are_undecodable() -> None:
    sound = encode(gradient(), "JPEG")
    assert cause_of(sound[: len(sound) // 2]) == "image_undecodable"
    assert cause_of(b"") == "image_undecodable"
    assert cause_of(b"<html>404</html>") == "image_undecodable"
    assert cause_of(encode(Image.new("RGB", (1, 1)), "JPEG")) == "image_too_small"


@pytest.mark.parametrize("file_format", ["PPM", "TIFF", "EPS"])
def test_other_formats_are_never_opened(file_format: str) -> None:
    """Pillow knows many more; some start programs, most are seldom looked after."""
    sound = encode(gradient(), file_format)
    assert Image.open(io.BytesIO(sound)).size == (24, 16)
    assert cause_of(sound) == "image_undecodable"


def test_bomb_is_rejected_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    png += struct.pack(">I", zlib.crc32(chunk))
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    png += struct.pack(">I", len(pixels) - 4) + pixels + struct.pack(">I", zlib.crc32(pixels))
    began = time.process_time()
    assert cause_of(png) == "image_too_many_pixels"
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "JPEG"])
def test_damaged_bytes_raise_nothing_else(file_format: str) -> None:
    sound = encode(gradient(), file_format)
    rng = np.random.default_rng(0)
    causes = set()
    for _ in range(300):
        damaged = bytearray(sound)
        for place in rng.integers(len(damaged), size=4):
            damaged[place] = rng.integers(256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except BadSample as error:
            causes.add(error.cause)
    assert "image_undecodable" in causes


def test_training_transform_is_open_clips() -> None:
    content = encode(gradient(), "PNG")
    transform = image_transform(32, is_train=True, aug_cfg=AugmentationCfg(scale=(0.3, 1.0)))
    torch.manual_seed(11)
    expected = transform(gradient())
    state = torch.get_rng_state()
    decode = ImageDecoder(32, crop_scale=(0.3, 1.0))
    assert torch.equal(decode(content, seed=11), expected)
    assert not torch.equal(decode(content, seed=12), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_transform_is_open_clips() -> None:
    expected = image_transform(32, is_train=False)(gradient())
    assert torch.equal(ImageDecoder(32, crop_scale=None)(encode(gradient(), "PNG")), expected)


@pytest.mark.parametrize("context_length", [8, 77])
def test_token_ids_are_open_clips(context_length: int) -> None:
    captions = [
        "a photo of a cat",
        "Tom &amp; Jerry  \n at 50% off!!",
        "naïve café ☕ 東京",
        "counterrevolutionaries internationalization " * 60,
        "x",
    ]
    expected = open_clip.SimpleTokenizer(context_length=context_length)(captions)
    tokenize = CaptionTokenizer(context_length)
    assert torch.equal(torch.stack([tokenize(caption) for caption in captions]), expected)


def test_endless_word_is_tokenized_in_time() -> None:
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 60_000)
    tokenize = CaptionTokenizer(77)
    began = time.process_time()
    tokenize("".join(map(chr, letters)))
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    ("content", "cause"), [(b" \n", "text_empty"), (b"\xff\xfe", "text_not_utf8")]
)
def test_bad_captions_are_named(content: bytes, cause: str) -> None:
    with pytest.raises(BadSample, match=cause):
        decode_text(content)

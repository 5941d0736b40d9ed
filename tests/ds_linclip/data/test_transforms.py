"""Every kind of image becomes the same RGB picture; the rest is rejected in time."""

import io
import itertools
import multiprocessing
import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from ds_linclip.data.tar_index import BadSample
from ds_linclip.data.transforms import (
    EvalTransform,
    Normalizer,
    TrainTransform,
    _random_crop,
    decode_image,
    open_image,
)


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
    grey = np.arange(2**16).reshape(256, 256).astype(np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(grey), "PNG")))
    assert (pixels == np.round(grey / 257)[..., None]).all()


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = decode_image(encode(gradient(), "JPEG", exif=exif))
    assert image.size == (16, 24)


def test_xmp_rotation_is_applied_in_training_too() -> None:
    """Some programs write the orientation nowhere else."""
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encode(photo(40, 40), "JPEG", xmp=xmp)
    upright = decode_image(encode(photo(40, 40), "JPEG")).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(upright))
    found = TrainTransform((1.0, 1.0), seed=0)(content, (40, 40), 0).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(upright))


@pytest.mark.long
def test_pixels_do_not_depend_on_the_strips_they_are_converted_in() -> None:
    """Larger than one strip, in the modes that are converted."""
    for mode in ("RGBA", "LA", "P", "L", "I;16"):
        source = photo(1100, 1000)
        if mode == "I;16":
            source = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
            expected = source.point(lambda x: x / 257).convert("L").convert("RGB")
        else:
            source = source.convert(mode)
            expected = source.convert("RGB")
        content = encode(source, "PNG")
        assert np.array_equal(np.asarray(decode_image(content)), np.asarray(expected)), mode
        found = TrainTransform((1.0, 1.0), seed=0)(content, (1100, 1000), 0).permute(1, 2, 0)
        assert np.array_equal(found.numpy(), np.asarray(expected)), mode


def test_broken_images_are_undecodable() -> None:
    sound = encode(gradient(), "JPEG")
    assert cause_of(sound[: len(sound) // 2]) == "image_undecodable"
    assert cause_of(b"") == "image_undecodable"
    assert cause_of(b"<html>404</html>") == "image_undecodable"
    assert cause_of(encode(Image.new("RGB", (1, 1)), "JPEG")) == "image_too_small"


@pytest.mark.parametrize("file_format", ["PPM", "TIFF", "EPS"])
def test_other_formats_are_never_opened(file_format: str) -> None:
    """Pillow reads many more formats; some start programs, most are rarely maintained."""
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


def segments_of(jpeg: bytes) -> list[bytes]:
    """Of a file that Pillow wrote, each with the scan behind it, without the end."""
    places = [m.start() for m in re.finditer(rb"\xff[^\x00\xd0-\xd7\xff]", jpeg)]
    bounds = [0, places[1]]
    while jpeg[bounds[-1] : bounds[-1] + 2] != b"\xff\xd9":
        length = int.from_bytes(jpeg[bounds[-1] + 2 : bounds[-1] + 4])
        bounds.append(next(place for place in places if place >= bounds[-1] + 2 + length))
    return [jpeg[a:b] for a, b in itertools.pairwise(bounds)]


def with_scans(num_scans: int, side: int = 64) -> bytes:
    """A sound progressive JPEG, one of whose scans is repeated."""
    segments = segments_of(encode(Image.new("RGB", (side, side)), "JPEG", progressive=True))
    scans = [i for i, segment in enumerate(segments) if segment[:2] == b"\xff\xda"]
    segments[scans[1] : scans[1] + 1] = [segments[scans[1]]] * (num_scans - len(scans) + 1)
    return b"".join([*segments, b"\xff\xd9"])


def test_jpeg_with_endless_scans_is_rejected() -> None:
    """Each scan takes a few bytes and goes over the whole image."""
    assert decode_image(with_scans(100)).size == (64, 64)
    assert cause_of(with_scans(101)) == "image_too_many_scans"
    with pytest.raises(BadSample, match="image_too_many_scans"):
        TrainTransform((0.5, 1.0), seed=0)(with_scans(101), (32, 32), 0)
    # In turn for each colour, and not progressive.
    head, scan = encode(Image.new("RGB", (64, 64)), "JPEG").split(b"\xff\xda")
    one = b"\xff\xda" + struct.pack(">H6B", 8, 1, 1, 0, 0, 63, 0) + scan[12:-2]
    assert cause_of(head + one * 101 + b"\xff\xd9") == "image_too_many_scans"
    began = time.process_time()
    assert cause_of(with_scans(2_000_000)) == "image_too_many_scans"
    assert time.process_time() - began < 2


def test_bytes_that_only_look_like_scans_do_not_count() -> None:
    """Previews in the headers, and whatever follows the end."""
    for jpeg in (with_scans(10), encode(gradient(), "JPEG")):
        looks = b"\xff\xda\0\x0c\3" * 200
        comment = b"\xff\xfe" + struct.pack(">H", len(looks) + 2) + looks
        content = jpeg[:2] + comment + jpeg[2:] + looks
        expected = TrainTransform((0.5, 1.0), seed=0)(jpeg, (8, 8), 0)
        assert torch.equal(TrainTransform((0.5, 1.0), seed=0)(content, (8, 8), 0), expected)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# Just within the limits: file format, mode, size and arguments.
LARGEST: list[tuple[str, str, tuple[int, int], dict[str, object]]] = [
    ("GIF", "P", (4096, 4096), {}),
    ("PNG", "P", (4096, 4096), {"transparency": 0}),
    ("PNG", "RGBA", (4096, 4096), {}),
    ("PNG", "LA", (4096, 4096), {"exif": rotated()}),
    ("PNG", "I;16", (4096, 4096), {}),
    ("WEBP", "RGBA", (4096, 4096), {"method": 0}),
    ("WEBP", "RGB", (4096, 4096), {"method": 0}),
    ("JPEG", "RGB", (4096, 4096), {"progressive": True, "subsampling": 0}),
    ("JPEG", "RGB", (8192, 4096), {"exif": rotated()}),
    ("JPEG", "CMYK", (8192, 4096), {}),
    ("JPEG", "RGB", (8192, 8192), {}),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("file_format", "mode", "size", "arguments"),
    [case for case in LARGEST if case[:2] not in (("WEBP", "RGB"), ("PNG", "LA"))],
)
def test_limit_of_pixels(
    file_format: str, mode: str, size: tuple[int, int], arguments: dict[str, object]
) -> None:
    content = encode(Image.new(mode, (size[0], size[1] + 1)), file_format, **arguments)
    assert cause_of(content) == "image_too_many_pixels"
    assert open_image(encode(Image.new(mode, size), file_format, **arguments)).size == size


def cost(decode: Callable[[bytes], object], content: bytes) -> tuple[float, float]:
    """MiB that the process has at the peak, and CPU seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now
    began = time.process_time()
    decode(content)
    seconds = time.process_time() - began
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return kib / 1024, seconds


def for_training(content: bytes) -> torch.Tensor:
    return TrainTransform((0.9, 1.0), seed=0)(content, (224, 224), 0)


@pytest.mark.long
def test_largest_images_cost_bounded_memory_and_time() -> None:
    # In a process of its own, where nothing else uses memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, _ = pool.apply(cost, (for_training, encode(gradient(), "PNG")))
        for file_format, mode, size, arguments in LARGEST:
            content = encode(Image.new(mode, size), file_format, **arguments)
            for decode in (for_training, decode_image):
                memory, seconds = pool.apply(cost, (decode, content))
                assert memory - before < 300, (file_format, mode, decode)
                assert seconds < 3, (file_format, mode, decode)
        assert memory - before > 200  # it sees what there is to see


def test_nothing_warns() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for file_format in ("PNG", "WEBP", "GIF", "JPEG"):
                for mode in ("RGB", "L"):
                    for_training(encode(gradient().convert(mode), file_format))
                    for_training(encode(gradient().convert(mode), file_format, exif=rotated()))
    finally:
        torch.set_warn_always(False)


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


def photo(height: int, width: int) -> Image.Image:
    """Soft shapes and a little noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(6, 9, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_crop_is_drawn_as_torchvision_draws_it() -> None:
    height, width, scale = 60, 80, (0.3, 1.0)
    rng = random.Random(0)
    ours = np.array([_random_crop(height, width, scale, rng) for _ in range(4000)])
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    top, left, bottom, right = ours.T
    for mine, other in zip((top, left, bottom - top, right - left), theirs.T, strict=True):
        assert ks_2samp(mine, other).pvalue > 1e-3
    assert (top >= 0).all()
    assert (bottom <= height).all()
    assert (right <= width).all()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_whole_image_is_resized_as_pillow_does(file_format: str) -> None:
    content = encode(photo(100, 100), file_format)
    found = TrainTransform((1.0, 1.0), seed=0)(content, (32, 48), 5).permute(1, 2, 0).numpy()
    source = Image.open(io.BytesIO(content)).convert("RGB")
    expected = np.asarray(source.resize((48, 32), Image.Resampling.BICUBIC))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= (1 if file_format == "PNG" else 12)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_gives_the_pixels_that_pillow_gives(mode: str) -> None:
    jpeg = encode(photo(64, 90).convert(mode), "JPEG", quality=90)
    png = encode(Image.open(io.BytesIO(jpeg)), "PNG")
    transform = TrainTransform((0.5, 1.0), seed=3)
    for position in range(20):
        assert torch.equal(transform(jpeg, (48, 48), position), transform(png, (48, 48), position))


def natural(height: int, width: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitudes fall with the frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    pixels = np.fft.irfft2(spectrum, (height, width))
    pixels = 127 + 50 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


@pytest.mark.parametrize("side", [24, 48, 64, 96])
def test_reduced_decoding_looks_the_same(side: int) -> None:
    """Sides that are no multiple of 8 pixels, and crops between the pixels of the reduced image."""
    jpeg = encode(natural(701, 803), "JPEG", quality=95)
    png = encode(Image.open(io.BytesIO(jpeg)), "PNG")
    transform = TrainTransform((0.5, 1.0), seed=3)
    for position in range(8):
        reduced, whole = (transform(c, (side, side), position).float() for c in (jpeg, png))
        # What is left is the sharpness that libjpeg takes; a crop beside it differs by 8 to 15.
        assert 0 < (reduced - whole).square().mean().sqrt() < 6


def test_crop_depends_on_seed_and_position_only() -> None:
    content = encode(photo(40, 40), "JPEG")
    state = torch.get_rng_state()
    first = TrainTransform((0.3, 1.0), seed=1)(content, (32, 32), 2**40)
    assert torch.equal(TrainTransform((0.3, 1.0), seed=1)(content, (32, 32), 2**40), first)
    assert not torch.equal(TrainTransform((0.3, 1.0), seed=2)(content, (32, 32), 2**40), first)
    assert not torch.equal(TrainTransform((0.3, 1.0), seed=1)(content, (32, 32), 7), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_rotated_jpeg_is_cropped_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(photo(40, 80), "JPEG", exif=exif)
    found = TrainTransform((1.0, 1.0), seed=0)(content, (64, 32), 0).permute(1, 2, 0).numpy()
    # The largest crop with an allowed aspect ratio, from the middle of 80 x 40 pixels.
    expected = decode_image(content).crop((0, 13, 40, 66)).resize((32, 64))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_damaged_bytes_are_bad_samples_for_training(file_format: str) -> None:
    sound = encode(gradient(), file_format)
    transform = TrainTransform((0.5, 1.0), seed=0)
    rng = np.random.default_rng(1)
    causes = set()
    for cut in rng.integers(len(sound), size=40):
        damaged = bytearray(sound[:cut])
        if cut:
            damaged[rng.integers(cut)] = rng.integers(256)
        try:
            assert transform(bytes(damaged), (8, 8), 0).shape == (3, 8, 8)
        except BadSample as error:
            causes.add(error.cause)
    assert "image_undecodable" in causes


def test_normalized_batch_is_open_clips() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 6, 4, 3)).astype(np.uint8)
    transform = image_transform((6, 4), is_train=False)
    expected = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    found = Normalizer(torch.device("cpu"))([images[:2], images[2:]])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("image_size", [(32, 32), (32, 48)])
def test_evaluation_transform_is_open_clips(image_size: tuple[int, int]) -> None:
    expected = image_transform(image_size, is_train=False)(gradient())
    assert torch.equal(
        EvalTransform(PreprocessCfg(size=image_size))(encode(gradient(), "PNG")), expected
    )

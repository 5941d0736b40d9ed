"""Find, read, check and resize images whose captions are in text files or in a table.

Resize modes are those of img2dataset; pixels are decoded as in training.
"""

import csv
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.prepare.shard_writer import EncodedSample, FailedSample, encode_jpeg
from ds_linclip.data.tar_index import IMAGE_SUFFIXES, BadSample
from ds_linclip.data.transforms import (
    MAX_IMAGE_BYTES,
    MAX_PIXELS,
    decode_image,
    open_image,
)

__all__ = ["PairLoader", "PairSet", "ResizeMode", "csv_pairs", "folder_pairs"]

ResizeMode = Literal["no", "border", "keep_ratio", "center_crop"]

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_MAX_JPEG_SIDE = 65500  # the limit of libjpeg; the format itself allows 65535
_MAX_FIELD = 2**31 - 1  # fits into a C long on every platform


@dataclass(frozen=True)
class PairSet:
    """A list of image-text pairs whose image files have not been read yet."""

    root: str  # the folder that relative image paths start from
    images: list[str]  # paths
    #: None where the table has none; a None for all: in a ``.txt`` file beside each image.
    captions: list[str | None] | None
    fingerprint: str  # changes when the files change


def folder_pairs(folder: Path) -> PairSet:
    """Return all images below a folder, sorted by path; ``a/b.txt`` has the caption of ``a/b.jpg``.

    Raises:
        ValueError: when it is not a folder or holds no images.
        OSError: when a folder below it cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"source ({folder}) must be a folder")
    images = []
    digest = hashlib.sha256()
    for path in sorted(_files_below(folder)):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        if suffix in (*IMAGE_SUFFIXES, ".txt"):
            file = folder / path
            state = file.stat() if file.exists() else file.lstat()  # a link may be broken
            digest.update(os.fsencode(path) + b"\0%d %d\0" % (state.st_size, state.st_mtime_ns))
    if not images:
        raise ValueError(f"source ({folder}) must hold images ({', '.join(IMAGE_SUFFIXES)})")
    return PairSet(str(folder), images, None, digest.hexdigest())


def csv_pairs(file: Path, *, image_column: str, caption_column: str, separator: str) -> PairSet:
    """Return the rows of a csv file with a header line.

    Args:
        file: A UTF-8 file; relative image paths in it start from its folder.
        image_column, caption_column: The names of the columns in the header.
        separator: The character between fields.

    Raises:
        ValueError: when the separator, the header or the quoting is invalid, or there are no rows.
        OSError: when the file cannot be read.
    """
    if len(separator) != 1 or separator in '"\r\n':
        raise ValueError(f"separator ({separator!r}) must be one character, no quote or line end")
    images, captions = [], []
    # A caption that is not UTF-8, or very long, makes one bad sample, not a bad table.
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        limit = csv.field_size_limit(_MAX_FIELD)
        try:
            columns = reader.fieldnames or []
            for name, value in (("image_column", image_column), ("caption_column", caption_column)):
                if value not in columns:
                    raise ValueError(f"{name} ({value}) must be a column of {file}: {columns}")
            for row in reader:
                images.append(row[image_column] or "")
                captions.append(row[caption_column])
        except csv.Error as error:
            raise ValueError(
                f"source ({file}) must be a csv file: line {reader.reader.line_num}: {error}"
            ) from error
        finally:
            csv.field_size_limit(limit)  # it is global
    if not images:
        raise ValueError(f"source ({file}) must hold rows")
    with open(file, "rb") as content:
        fingerprint = hashlib.file_digest(content, "sha256").hexdigest()
    return PairSet(str(file.parent), images, captions, fingerprint)


@dataclass(frozen=True)
class PairLoader:
    """A picklable function that reads, checks and resizes one pair.

    Attributes:
        root: See :class:`PairSet`.
        resize: "no" keeps the bytes of the file, after decoding them as a check; "border" scales
            the longer side to ``image_size`` and fills the square with white; "keep_ratio" scales
            the shorter side to it; "center_crop" also crops the central square.
        image_size: The side in pixels; ignored for "no".
    """

    root: str
    resize: ResizeMode
    image_size: int

    def __call__(self, pair: tuple[str, str | None, bool]) -> EncodedSample | FailedSample:
        """Load one pair.

        Args:
            pair: The path of the image, its caption, and whether the caption is in a file instead.
        """
        url, text, caption_in_file = pair
        readable_url = os.fsencode(url).decode("utf-8", "replace")
        path = os.path.join(self.root, url)
        caption, step = None, "download"
        try:
            if caption_in_file:
                caption = decode_text(_read(os.path.splitext(path)[0] + ".txt", "text"))
            else:
                caption = _checked_text(text)
            content = _read(path, "image")
            step = "resize"
            image = decode_image(content)
            original_size = image.size
            if self.resize == "no":
                stored, extension = content, _EXTENSIONS[open_image(content).format or ""]
            else:
                image = _resized(image, self.resize, self.image_size)
                stored, extension = encode_jpeg(image), "jpg"
        except BadSample as error:
            return FailedSample(readable_url, caption, f"failed_to_{step}", error.cause)
        return EncodedSample(
            image=stored,
            extension=extension,
            caption=caption,
            url=readable_url,
            size=image.size,
            original_size=original_size,
            exif=None,
            sha256=hashlib.sha256(content).hexdigest(),
        )


def _files_below(folder: Path) -> Iterator[str]:
    """Yield relative paths; a folder that cannot be listed is an error."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        prefix = os.path.relpath(parent, folder)
        for name in names:
            yield name if prefix == "." else os.path.join(prefix, name)


def _read(path: str, role: Literal["image", "text"]) -> bytes:
    limit = MAX_IMAGE_BYTES if role == "image" else MAX_TEXT_BYTES
    if not os.path.isfile(path):
        raise BadSample(f"{role}_missing")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BadSample(f"{role}_unreadable") from error
    if len(content) > limit:
        raise BadSample(f"{role}_too_many_bytes")
    return content


def _checked_text(text: str | None) -> str:
    if text is None:
        raise BadSample("text_missing")
    content = text.encode("utf-8", "surrogateescape")
    if len(content) > MAX_TEXT_BYTES:
        raise BadSample("text_too_many_bytes")
    return decode_text(content)


def _resized(image: Image.Image, mode: ResizeMode, image_size: int) -> Image.Image:
    """Resize as img2dataset does: sides rounded, area averaging down, Lanczos up."""
    scale = image_size / (max(image.size) if mode == "border" else min(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS or max(width, height) > _MAX_JPEG_SIDE:
        raise BadSample("image_too_many_pixels")
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    image = image.resize((width, height), resampling)
    left, top = (image_size - width) // 2, (image_size - height) // 2
    if mode == "border":
        square = Image.new("RGB", (image_size, image_size), "white")
        square.paste(image, (left, top))
        return square
    if mode == "center_crop":
        left, top = (width - image_size) // 2, (height - image_size) // 2
        return image.crop((left, top, left + image_size, top + image_size))
    return image

"""Find, read, check and resize images whose captions are in text files or in a table.

Resize modes are those of img2dataset; pixels are decoded as in training.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.folder_files import files_below
from ds_linclip.data.prepare.caption_table import Text, read_table
from ds_linclip.data.prepare.shard_writer import EncodedSample, FailedSample, encode_jpeg
from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_index import IMAGE_SUFFIXES, BadSample
from ds_linclip.data.transforms import (
    MAX_IMAGE_BYTES,
    MAX_PIXELS,
    decode_image,
    open_image,
)

__all__ = [
    "PairLoader",
    "PairSet",
    "ResizeMode",
    "folder_pairs",
    "further_captions",
    "table_pairs",
]

ResizeMode = Literal["no", "border", "keep_ratio", "center_crop"]

_MAX_JPEG_SIDE = 65500  # the limit of libjpeg; the format itself allows 65535


@dataclass(frozen=True)
class PairSet:
    """A list of image-text pairs whose image files have not been read yet."""

    source: str  # the folder, or the table
    root: str  # the folder that relative image paths start from
    images: list[str]  # paths
    #: None where there is none; with ``captions_in_files`` the suffix of the text file that differs
    #: from the image in its suffix only.
    captions: list[str | None]
    captions_in_files: bool
    fingerprint: str  # changes when the files change
    passed_over: Tally  # files of the folder, or lines of the table, that are no part of a pair
    shared_captions: Tally  # images whose caption file belongs to an image before too
    #: Further captions of all images, by column of the table.
    further: dict[str, list[Text]] = field(default_factory=dict)


def folder_pairs(folder: Path) -> PairSet:
    """Return all images below a folder, sorted by path; ``a/b.txt`` has the caption of ``a/b.jpg``.

    Links to folders are followed, each folder is read once. Hidden files and folders are passed
    over.

    Raises:
        ValueError: when it is not a folder or holds no images.
        OSError: when a folder below it cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"source ({folder}) must be a folder")
    passed_over, shared_captions = Tally(), Tally()
    images: list[str] = []
    texts: dict[str, str] = {}  # stem -> suffix
    digest = hashlib.sha256()
    for path, _ in sorted(files_below(folder, passed_over)):
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in (*IMAGE_SUFFIXES, ".txt"):
            digest.update(os.fsencode(path) + b"\0%d %d\0" % _size_and_time(folder / path))
            if suffix.lower() != ".txt":
                images.append(path)
                continue
            if stem in texts:  # .TXT is sorted before .txt
                passed_over.add("unused_text", stem + texts[stem])
            texts[stem] = suffix
        else:
            passed_over.add(f"*{suffix.lower()}" if suffix else "no_suffix", path)
    captions: list[str | None] = []
    used: set[str] = set()
    for path in images:
        stem = os.path.splitext(path)[0]
        captions.append(texts.get(stem))
        if stem in used:
            shared_captions.add("caption_shared", path)
        elif stem in texts:
            used.add(stem)
    for stem, suffix in texts.items():
        if stem not in used:
            passed_over.add("unused_text", stem + suffix)
    if not images:
        found = f"; it holds {passed_over}" if passed_over else ""
        raise ValueError(f"source ({folder}) must hold images ({', '.join(IMAGE_SUFFIXES)}){found}")
    return PairSet(
        source=str(folder),
        root=str(folder),
        images=images,
        captions=captions,
        captions_in_files=True,
        fingerprint=digest.hexdigest(),
        passed_over=passed_over,
        shared_captions=shared_captions,
    )


def table_pairs(
    file: Path,
    *,
    image_column: str,
    caption_column: str,
    separator: str,
    further_columns: Sequence[str] = (),
) -> PairSet:
    """Return the rows of a table; relative image paths in it start from its folder.

    Arguments and errors are those of :func:`ds_linclip.data.prepare.caption_table.read_table`.
    """
    images, captions, passed_over, further = read_table(
        file,
        image_column=image_column,
        caption_column=caption_column,
        separator=separator,
        further_columns=further_columns,
    )
    digest = hashlib.sha256()
    for text in (*images, *captions):
        digest.update(b"\xff" if text is None else text.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    for name, column in further.items():
        digest.update(repr((name, column)).encode())
    return PairSet(
        source=str(file),
        root=str(file.parent),
        images=images,
        captions=captions,
        captions_in_files=False,
        fingerprint=digest.hexdigest(),
        passed_over=passed_over,
        shared_captions=Tally(),
        further=further,
    )


def further_captions(
    pairs: PairSet, number: int, unusable: Tally
) -> dict[str, str | list[str]] | None:
    """Return the usable further captions of an image by column, and count the others.

    Args:
        pairs, number: The pairs, and the number of the image in them.
        unusable: Counts what is left out, as ``<column>/<cause>``.

    Returns:
        None if the pairs have no further columns.
    """
    found: dict[str, str | list[str]] = {}
    for name, column in pairs.further.items():
        given = column[number]
        texts: list[str] = []
        for text in given if isinstance(given, list) else [given]:
            try:
                if text is None:
                    raise BadSample("text_missing")
                texts.append(_checked_text(text))
            except BadSample as error:
                readable = os.fsencode(pairs.images[number]).decode("utf-8", "replace")
                unusable.add(f"{name}/{error.cause}", readable)
        if texts:
            found[name] = texts if isinstance(given, list) else texts[0]
    return found if pairs.further else None


@dataclass(frozen=True)
class PairLoader:
    """A picklable function that reads, checks and resizes one pair.

    Attributes:
        root: See :class:`PairSet`.
        resize: "no" keeps the bytes of the file, after decoding them as a check; "border" scales
            the longer side to ``image_size`` and fills the square with white; "keep_ratio" scales
            the shorter side to it; "center_crop" also crops the central square.
        image_size: The side in pixels; ignored for "no".
        captions_in_files: See :class:`PairSet`.
    """

    root: str
    resize: ResizeMode
    image_size: int
    captions_in_files: bool

    def __call__(self, pair: tuple[str, str | None]) -> EncodedSample | FailedSample:
        """Load one pair: its image and its caption, as in :class:`PairSet`."""
        url, text = pair
        readable_url = os.fsencode(url).decode("utf-8", "replace")
        path = os.path.join(self.root, url)
        caption, step = None, "download"
        try:
            if text is None:
                raise BadSample("text_missing")
            if self.captions_in_files:
                caption = decode_text(_read(os.path.splitext(path)[0] + text, "text"))
            else:
                caption = _checked_text(text)
            content = _read(path, "image")
            step = "resize"
            image = decode_image(content)
            original_size = image.size
            if self.resize == "no":
                stored, extension = content, _extension(content)
            else:
                image = _resized(image, self.resize, self.image_size)
                stored, extension = encode_jpeg(image), "jpg"
        except BadSample as error:
            return FailedSample(readable_url, caption, f"failed_to_{step}", error.cause)
        except Exception as error:  # noqa: BLE001 - of a decoder or of ours: it costs this pair only
            cause = f"unexpected_{type(error).__name__}"
            return FailedSample(readable_url, caption, f"failed_to_{step}", cause)
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


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError:  # a link may be broken
        state = file.lstat()
    return state.st_size, state.st_mtime_ns


def _extension(content: bytes) -> str:
    """Return the extension under which a file that training can decode is stored."""
    image = open_image(content)
    # Formats built on JPEG have names of their own, such as the MPO of phones.
    return "jpg" if isinstance(image, JpegImageFile) else str(image.format).lower()


def _read(path: str, role: Literal["image", "text"]) -> bytes:
    limit = MAX_IMAGE_BYTES if role == "image" else MAX_TEXT_BYTES
    if not os.path.isfile(path):
        raise BadSample(f"{role}_{_absence(path)}")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BadSample(f"{role}_unreadable") from error
    if len(content) > limit:
        raise BadSample(f"{role}_too_many_bytes")
    return content


def _absence(path: str) -> str:
    """Return why there is no file: tables often name what is not on this machine."""
    if "://" in path:
        return "is_url"
    return "path_of_windows" if "\\" in path else "missing"


def _checked_text(text: str) -> str:
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

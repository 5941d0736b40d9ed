"""Write data sets in their public formats.

Training shards have the format in which img2dataset writes LAION-400M (tar, parquet, and
``_stats.json`` last), held-out folders the format of clip_benchmark. The bytes depend only on the
samples. A data set is complete or not there.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from webdataset import TarWriter

from ds_linclip.process.atomic import atomic_directory

__all__ = [
    "EncodedSample",
    "FailedSample",
    "RawSample",
    "encode_jpeg",
    "write_labelled_folder",
    "write_once",
    "write_train_shard",
]

_RECORD = "dataset.json"
#: Columns of the parquet, which are the fields of a sample's JSON.
_TEXTS = ("url", "caption", "key", "status", "error_message")
_SIDES = ("width", "height", "original_width", "original_height")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        *((name, pa.int32()) for name in _SIDES),
        *((name, pa.string()) for name in ("exif", "sha256")),
    ]
)


@dataclass(frozen=True)
class EncodedSample:
    """A sample that is ready to be written."""

    image: bytes  # the file
    extension: str  # of its tar member: jpg, png, webp or gif
    caption: str  # not empty
    url: str  # the source of the image
    size: tuple[int, int]  # (width, height) in pixels
    original_size: tuple[int, int]  # the same before any scaling
    exif: str | None  # as JSON; None: not read
    sha256: str  # of the image file before any scaling
    #: Further captions by name, for the JSON member; None: it gets no such entry.
    captions: Mapping[str, str | list[str]] | None = None

    def meta(self, key: str) -> dict[str, Any]:
        """Return the fields of the JSON member; the parquet row has all but the captions."""
        texts = (self.url, self.caption, key, "success", None)
        values = (*texts, *self.size, *self.original_size, self.exif, self.sha256)
        fields = dict(zip(_SCHEMA.names, values, strict=True))
        return fields if self.captions is None else {**fields, "captions": dict(self.captions)}


@dataclass(frozen=True)
class FailedSample:
    """A source from which no sample could be made."""

    url: str
    caption: str | None  # None: missing or unusable
    status: str  # in img2dataset's words: failed_to_download or failed_to_resize
    cause: str  # the name under which it is counted

    def meta(self, key: str) -> dict[str, Any]:
        """Return the fields of the parquet row."""
        values = (self.url, self.caption, key, self.status, self.cause)
        return dict(zip(_TEXTS, values, strict=True))


@dataclass(frozen=True)
class RawSample:
    """An RGB image before it is encoded, with its caption and source as in an encoded sample."""

    image: Image.Image
    caption: str
    url: str
    original_size: tuple[int, int]
    label: int = -1  # the class number; used in held-out folders only

    def encode(self) -> EncodedSample:
        """Return the sample with its image as a JPEG file."""
        jpeg = encode_jpeg(self.image)
        return EncodedSample(
            image=jpeg,
            extension="jpg",
            caption=self.caption,
            url=self.url,
            size=self.image.size,
            original_size=self.original_size,
            exif="{}",
            sha256=hashlib.sha256(jpeg).hexdigest(),
        )


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB image as img2dataset does: JPEG, quality 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_train_shard(
    folder: Path, number: int, samples: Iterable[EncodedSample | FailedSample]
) -> Counter[str]:
    """Write ``NNNNN.tar``, ``NNNNN.parquet`` and, last, ``NNNNN_stats.json`` into a folder.

    A failed sample leaves a gap in the keys, a row in the parquet and a count in the statistics.

    Returns:
        The number of samples as ``success``, and of failures by cause.
    """
    stem = f"{number:05d}"
    rows = []
    with open(folder / f"{stem}.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            rows.append(sample.meta(f"{stem}{index:04d}"))
            if isinstance(sample, EncodedSample):
                tar.write(_members(sample, rows[-1]))
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), folder / f"{stem}.parquet")
    status = Counter(row["status"] for row in rows)
    causes = Counter(row["error_message"] or "success" for row in rows)
    stats = {
        "count": len(rows),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        **dict.fromkeys(("duration", "start_time", "end_time"), 0.0),
        "status_dict": dict(sorted(causes.items())),
    }
    (folder / f"{stem}_stats.json").write_text(json.dumps(stats, indent=4))
    return causes


def write_labelled_folder(
    folder: Path,
    samples: Iterable[RawSample],
    *,
    classnames: Sequence[str],
    templates: Sequence[str],
) -> None:
    """Write a held-out folder: one tar in ``test``, which must not exist yet, and two lists.

    Args:
        folder, samples: The folder, and its labelled samples.
        classnames: The names of the classes, in the order of their labels.
        templates: Prompt templates with ``{c}`` for the name.
    """
    (folder / "test").mkdir(parents=True)
    with open(folder / "test" / "0.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            encoded = sample.encode()
            members = _members(encoded, encoded.meta(f"s{index:07d}"))
            tar.write({**members, "cls": str(sample.label).encode()})
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


def write_once(out: Path, record: Mapping[str, object], write: Callable[[Path], None]) -> bool:
    """Write a data set into a new folder, unless the folder holds the same data set already.

    Args:
        out: A folder that does not exist, is empty, or holds the same data set.
        record: The parameters of the data set, stored in ``dataset.json``.
        write: Fills the folder that it is given; that folder is renamed to ``out`` at the end.

    Returns:
        Whether the data set was written; False when ``out`` held it already.

    Raises:
        ValueError: when ``out`` holds anything else.
        OSError: when the folder cannot be written.
    """
    if _holds(out, record):
        return False
    try:
        with atomic_directory(out) as folder:
            write(folder)
            (folder / _RECORD).write_text(json.dumps(record, indent=4) + "\n")
    except OSError:
        if _holds(out, record):  # another process has written it in the meantime
            return False
        raise
    return True


def _holds(out: Path, record: Mapping[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"out ({out}) must be empty or hold a complete data set") from error
    if found != record:
        raise ValueError(f"out ({out}) must be empty: it holds {found}, not {record}")
    return True


def _members(sample: EncodedSample, meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "__key__": meta["key"],
        sample.extension: sample.image,
        "json": json.dumps(meta, indent=4).encode(),
        "txt": sample.caption.encode(),
    }


def _tar_writer(file: BinaryIO) -> TarWriter:
    return TarWriter(file, mtime=0, encoder=False)

"""Write data sets in their public formats.

Training shards have the format in which img2dataset writes LAION-400M (tar, parquet, and
``_stats.json`` last), held-out folders the format of clip_benchmark. The bytes depend only on the
samples.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from webdataset import TarWriter

__all__ = [
    "EncodedSample",
    "FailedSample",
    "RawSample",
    "encode_jpeg",
    "write_labelled_folder",
    "write_train_shard",
]

_PARQUET_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class EncodedSample:
    """A sample that is ready to be written.

    Attributes:
        image: The bytes of the image file.
        extension: The extension of its tar member: ``jpg``, ``png``, ``webp`` or ``gif``.
        caption: The caption, not empty.
        url: The source of the image.
        size: Width and height in pixels.
        original_size: Width and height in pixels before any scaling.
        exif: The EXIF data as JSON; None: they were not read.
        sha256: The hash of the image file before any scaling.
    """

    image: bytes
    extension: str
    caption: str
    url: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    exif: str | None
    sha256: str

    def meta(self, key: str) -> dict[str, str | int | None]:
        """Return the fields of the JSON member and of the parquet row."""
        return {
            "url": self.url,
            "caption": self.caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": self.size[0],
            "height": self.size[1],
            "original_width": self.original_size[0],
            "original_height": self.original_size[1],
            "exif": self.exif,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class FailedSample:
    """A source from which no sample could be made.

    Attributes:
        url: The source of the image.
        caption: The caption; None when it is missing or unusable.
        status: The step that failed, in img2dataset's words.
        cause: The name under which the failure is counted.
    """

    url: str
    caption: str | None
    status: Literal["failed_to_download", "failed_to_resize"]
    cause: str

    def meta(self, key: str) -> dict[str, str | int | None]:
        """Return the fields of the parquet row."""
        return {
            "url": self.url,
            "caption": self.caption,
            "key": key,
            "status": self.status,
            "error_message": self.cause,
        }


@dataclass(frozen=True)
class RawSample:
    """An image before it is encoded, with its caption and source.

    Attributes:
        image: The RGB image.
        caption: The caption, not empty.
        url: The source of the image.
        original_size: Width and height in pixels before any scaling.
        label: The class number; used in held-out folders only.
    """

    image: Image.Image
    caption: str
    url: str
    original_size: tuple[int, int]
    label: int = -1

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
    """Write ``NNNNN.tar``, ``NNNNN.parquet`` and, last, ``NNNNN_stats.json``.

    A failed sample leaves a gap in the keys, a row in the parquet and a count in the statistics.

    Args:
        folder: An existing folder.
        number: The number of the shard, its file name.
        samples: The samples of the shard.

    Returns:
        The number of samples as ``success``, and of failures by cause.
    """
    stem = f"{number:05d}"
    rows = []
    with open(folder / f"{stem}.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            key = f"{stem}{index:04d}"
            rows.append(sample.meta(key))
            if isinstance(sample, EncodedSample):
                meta = json.dumps(rows[-1], indent=4).encode()
                members = {sample.extension: sample.image, "json": meta}
                tar.write({"__key__": key, **members, "txt": sample.caption.encode()})
    pq.write_table(pa.Table.from_pylist(rows, _PARQUET_SCHEMA), folder / f"{stem}.parquet")
    status = Counter(row["status"] for row in rows)
    causes = Counter(str(row["error_message"] or "success") for row in rows)
    stats = {
        "count": len(rows),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
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
) -> int:
    """Write a held-out folder: class names, templates, and one tar in ``test``.

    Args:
        folder: The folder, which must not have a ``test`` folder.
        samples: The labelled samples.
        classnames: The names of the classes, in the order of their labels.
        templates: Prompt templates with ``{c}`` for the name.

    Returns:
        The number of samples.
    """
    (folder / "test").mkdir(parents=True)
    count = 0
    with open(folder / "test" / "0.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            key, encoded = f"s{index:07d}", sample.encode()
            tar.write(
                {
                    "__key__": key,
                    "jpg": encoded.image,
                    "cls": str(sample.label).encode(),
                    "txt": sample.caption.encode(),
                    "json": json.dumps(encoded.meta(key), indent=4).encode(),
                }
            )
            count += 1
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return count


def _tar_writer(file: io.BufferedWriter) -> TarWriter:
    return TarWriter(file, mtime=0, encoder=False)

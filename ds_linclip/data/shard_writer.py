"""Writes data sets the way they are found in the wild.

Training shards as img2dataset writes LAION-400M (tar, parquet, ``_stats.json`` last), held-out
folders as clip_benchmark reads them. The bytes depend on the samples alone.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from webdataset import TarWriter

__all__ = ["RawSample", "write_labelled_folder", "write_train_shard"]

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
class RawSample:
    """An image before it is encoded, its caption and where it comes from.

    Attributes:
        image: RGB.
        caption: Not empty.
        url: Names the source.
        original_size: Width and height before any scaling, in pixels.
        label: Class number; used in held-out folders only.
    """

    image: Image.Image
    caption: str
    url: str
    original_size: tuple[int, int]
    label: int = -1

    def jpeg(self) -> bytes:
        """Encoded as img2dataset does: JPEG, quality 95."""
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    def meta(self, key: str, jpeg: bytes) -> dict[str, str | int | None]:
        """The fields of the JSON member and of the parquet row."""
        return {
            "url": self.url,
            "caption": self.caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": self.image.width,
            "height": self.image.height,
            "original_width": self.original_size[0],
            "original_height": self.original_size[1],
            "exif": "{}",
            "sha256": hashlib.sha256(jpeg).hexdigest(),
        }


def write_train_shard(folder: Path, number: int, samples: Iterable[RawSample]) -> int:
    """Write ``NNNNN.tar``, ``NNNNN.parquet`` and, last, ``NNNNN_stats.json``.

    Returns:
        Number of samples written.
    """
    stem = f"{number:05d}"
    rows = []
    with open(folder / f"{stem}.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            key, jpeg = f"{stem}{index:04d}", sample.jpeg()
            rows.append(sample.meta(key, jpeg))
            meta = json.dumps(rows[-1], indent=4).encode()
            text = sample.caption.encode()
            tar.write({"__key__": key, "jpg": jpeg, "json": meta, "txt": text})
    pq.write_table(pa.Table.from_pylist(rows, _PARQUET_SCHEMA), folder / f"{stem}.parquet")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(rows)},
    }
    (folder / f"{stem}_stats.json").write_text(json.dumps(stats, indent=4))
    return len(rows)


def write_labelled_folder(
    folder: Path,
    samples: Iterable[RawSample],
    *,
    classnames: Sequence[str],
    templates: Sequence[str],
) -> int:
    """Write a held-out folder: class names, templates, and one tar in ``test``.

    Returns:
        Number of samples written.
    """
    (folder / "test").mkdir(parents=True)
    count = 0
    with open(folder / "test" / "0.tar", "wb") as file, _tar_writer(file) as tar:
        for index, sample in enumerate(samples):
            key, jpeg = f"s{index:07d}", sample.jpeg()
            tar.write(
                {
                    "__key__": key,
                    "jpg": jpeg,
                    "cls": str(sample.label).encode(),
                    "txt": sample.caption.encode(),
                    "json": json.dumps(sample.meta(key, jpeg), indent=4).encode(),
                }
            )
            count += 1
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return count


def _tar_writer(file: io.BufferedWriter) -> TarWriter:
    return TarWriter(file, mtime=0, encoder=False)

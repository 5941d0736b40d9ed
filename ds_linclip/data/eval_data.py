"""Held-out classification data in clip_benchmark's webdataset layout.

``FOLDER/classnames.txt``, ``FOLDER/zeroshot_classification_templates.txt`` (``{c}`` stands for the
class) and tars in ``FOLDER/test`` or in ``FOLDER`` itself, with an image, ``cls`` (the class
number) and optionally ``txt`` per sample.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from ds_linclip.data.decode import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, ImageDecoder
from ds_linclip.data.loader import ordered_loader
from ds_linclip.data.shards import BadSample, OpenShard

__all__ = ["LabelledBatch", "labelled_batches", "read_classes"]

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class LabelledBatch:
    """Held-out images with their classes.

    Attributes:
        images: [B, 3, H, W] float32, normalised.
        labels: [B] int64 class numbers.
        keys: Key of each sample within its shard.
        captions: Text of each sample; empty where it has none.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device; asynchronous from pinned memory."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def read_classes(folder: str | Path) -> tuple[list[str], list[str]]:
    """Class names, and prompt templates in which ``{c}`` stands for one.

    Raises:
        ValueError: naming ``eval.data``, for a missing or empty file or a template without ``{c}``.
    """
    classnames = _read_lines(Path(folder) / _CLASSNAMES)
    templates = _read_lines(Path(folder) / _TEMPLATES)
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"eval.data ({folder}): template ({template}) must contain {{c}}")
    return classnames, templates


def labelled_batches(
    folder: str | Path,
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
) -> Iterator[LabelledBatch]:
    """One rank's share of the held-out samples, once, in a fixed order.

    Rank r takes samples r, r + world_size, ...; nothing is padded or repeated, so ranks may get one
    sample, and one batch, more or fewer than others. Transformed as open_clip does for evaluation.

    Args:
        folder: See the module.
        image_size: Side of the images in pixels.
        batch_size: Samples per batch; the last may be smaller.
        rank, world_size: This rank and how many there are.
        num_workers: Decoding processes.

    Raises:
        ValueError: naming ``eval.data``; at once for a folder without readable tars, on the way for
            a sample that cannot be read (a score over fewer samples would not be the score).
    """
    dataset = _LabelledDataset(Path(folder), image_size, batch_size, rank, world_size)
    return _raise_errors(
        ordered_loader(dataset, SequentialSampler(dataset), num_workers=num_workers)
    )


class _LabelledDataset(Dataset[LabelledBatch | ValueError]):
    """Maps a batch number to one rank's labelled batch."""

    def __init__(
        self, folder: Path, image_size: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self._folder = folder
        self._batch_size = batch_size
        self._shards = [self._open(path) for path in _find_tars(folder)]
        places = [
            (number, index)
            for number, shard in enumerate(self._shards)
            for index in range(len(shard))
        ]
        self._places = places[rank::world_size]
        self._decode = ImageDecoder(image_size, crop_scale=None)

    def __len__(self) -> int:
        return -(-len(self._places) // self._batch_size)

    def __getitem__(self, number: int) -> LabelledBatch | ValueError:
        start = number * self._batch_size
        images, labels, keys, captions = [], [], [], []
        for shard, index in self._places[start : start + self._batch_size]:
            opened = self._shards[shard]
            try:
                content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
                images.append(self._decode(content))
                labels.append(int(opened.read(index, "class", max_bytes=32)))
                captions.append(_caption(opened, index))
            except (BadSample, ValueError) as error:
                return ValueError(
                    f"eval.data ({self._folder}): sample {opened.keys[index]} of {opened.path} "
                    f"must be readable: {error}"
                )
            keys.append(opened.keys[index])
        return LabelledBatch(torch.stack(images), torch.tensor(labels), keys, captions)

    def _open(self, path: Path) -> OpenShard:
        try:
            return OpenShard(str(path))
        except BadSample as error:
            raise ValueError(
                f"eval.data ({self._folder}): {path} must be a readable tar: {error}"
            ) from error


def _raise_errors(
    items: Iterable[LabelledBatch | ValueError],
) -> Iterator[LabelledBatch]:
    for item in items:
        if isinstance(item, ValueError):
            raise item
        yield item


def _caption(shard: OpenShard, index: int) -> str:
    try:
        return shard.read(index, "text", max_bytes=MAX_TEXT_BYTES).decode("utf-8").strip()
    except BadSample as error:
        if error.cause == "text_missing":
            return ""
        raise


def _find_tars(folder: Path) -> list[Path]:
    for place in (folder, folder / "test"):
        tars = sorted(place.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if tars:
            return tars
    raise ValueError(f"eval.data ({folder}) must be a folder with tars in it or in its test folder")


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"eval.data ({path.parent}) must hold a readable {path.name}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"eval.data ({path.parent}) must hold a {path.name} that is not empty")
    return lines

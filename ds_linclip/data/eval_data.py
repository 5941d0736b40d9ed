"""Held-out classification data in clip_benchmark's webdataset layout.

``FOLDER/classnames.txt``, ``FOLDER/zeroshot_classification_templates.txt`` (``{c}``, or open_clip's
``{}``, stands for the class) and tars in ``FOLDER/test`` or in ``FOLDER`` itself, with an image,
``cls`` (the class number) and optionally ``txt`` per sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from ds_linclip.data.decode import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, EvalTransform
from ds_linclip.data.loader import ordered_loader
from ds_linclip.data.shards import raise_file_limit
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["LabelledBatch", "LabelledData"]

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_MAX_CLASS_BYTES = 32

_Place = tuple[OpenShard, int]


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

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class LabelledData:
    """One rank's share of a held-out folder, opened once; every iteration reads it in full.

    Rank r takes samples r, r + world_size, ... in a fixed order; nothing is padded or repeated, so
    ranks may get one sample, and one batch, more or fewer than others. The tars stay open, so what is read is what was checked.

    Args:
        folder: See the module.
        transform: Image file to model input.
        batch_size: Samples per batch; the last may be smaller.
        rank, world_size: This rank and how many there are.
        num_workers: Decoding processes.

    Attributes:
        classnames: The names; the index of a name is its class number.
        templates: Prompts with a place for the name.

    Raises:
        ValueError: naming ``eval.data``; at construction for a missing or empty file, and for a
            sample of this rank without an image or without a class in the list; while iterating for
            one that cannot be decoded (a score over fewer samples would not be the score).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        transform: EvalTransform,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        folder = Path(folder)
        self.classnames = _read_lines(folder / _CLASSNAMES)
        self.templates = _read_lines(folder / _TEMPLATES)
        raise_file_limit()
        shards = [_open(folder, path) for path in _find_tars(folder)]
        places = [(shard, index) for shard in shards for index in range(len(shard))]
        if not places:
            raise ValueError(f"eval.data ({folder}) must hold at least one sample")
        places = places[rank::world_size]
        labels = [_read_label(folder, place, len(self.classnames)) for place in places]
        self._dataset = _LabelledDataset(folder, transform, batch_size, places, labels)
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[LabelledBatch]:
        sampler = SequentialSampler(self._dataset)
        for item in ordered_loader(self._dataset, sampler, num_workers=self._num_workers):
            if isinstance(item, ValueError):
                raise item
            yield item


class _LabelledDataset(Dataset[LabelledBatch | ValueError]):
    """Maps a batch number to one rank's labelled batch."""

    def __init__(
        self,
        folder: Path,
        transform: EvalTransform,
        batch_size: int,
        places: list[_Place],
        labels: list[int],
    ) -> None:
        self._folder = folder
        self._batch_size = batch_size
        self._places = places
        self._labels = labels
        self._transform = transform

    def __len__(self) -> int:
        return -(-len(self._places) // self._batch_size)

    def __getitem__(self, number: int) -> LabelledBatch | ValueError:
        share = slice(number * self._batch_size, (number + 1) * self._batch_size)
        images, keys, captions = [], [], []
        for shard, index in self._places[share]:
            try:
                content = shard.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
                images.append(self._transform(content))
                captions.append(_caption(shard, index))
            except (BadSample, OSError, ValueError) as error:
                # As a value: raised in a worker, it would arrive as a traceback.
                return _sample_error(self._folder, (shard, index), f"be readable: {error}")
            keys.append(shard.keys[index])
        labels = torch.tensor(self._labels[share])
        return LabelledBatch(torch.stack(images), labels, keys, captions)


def _open(folder: Path, path: Path) -> OpenShard:
    try:
        return OpenShard(path.open("rb"), str(path))
    except (BadSample, OSError) as error:
        raise ValueError(f"eval.data ({folder}): {path} must be a readable tar: {error}") from error


def _read_label(folder: Path, place: _Place, num_classes: int) -> int:
    """Class number of a sample, having checked that it is one and that there is an image."""
    shard, index = place
    try:
        shard.find(index, "image", max_bytes=MAX_IMAGE_BYTES)
        label = int(shard.read(index, "class", max_bytes=_MAX_CLASS_BYTES))
    except (BadSample, OSError, ValueError) as error:
        raise _sample_error(folder, place, f"be readable: {error}") from error
    if not 0 <= label < num_classes:
        rule = f"have a class in [0, {num_classes}), the lines of {_CLASSNAMES}; it has {label}"
        raise _sample_error(folder, place, rule)
    return label


def _sample_error(folder: Path, place: _Place, rule: str) -> ValueError:
    shard, index = place
    sample = f"sample {shard.keys[index]} of {shard.url}"
    return ValueError(f"eval.data ({folder}): {sample} must {rule}")


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

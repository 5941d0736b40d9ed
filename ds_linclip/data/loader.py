"""Training batches: the local part of each global batch, decoded by worker processes.

The only state is the step number; :meth:`TrainData.batches` starts anywhere by seeking.
"""

import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_linclip.config import DataConfig
from ds_linclip.data.decode import CaptionTokenizer, ImageDecoder
from ds_linclip.data.order import SampleOrder
from ds_linclip.data.samples import DataError, SampleReader
from ds_linclip.data.shards import find_shards, raise_file_limit

__all__ = ["Batch", "TrainData", "ordered_loader"]

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Batch:
    """Image-text pairs of one rank in one step.

    Attributes:
        images: [B, 3, H, W] float32, normalised.
        texts: [B, L] int64 token ids.
        keys: Key of each sample within its shard.
        captions: Text the ids come from.
        skipped: Bad samples that were replaced in this batch, counted by cause.
    """

    images: Tensor
    texts: Tensor
    keys: list[str]
    captions: list[str]
    skipped: dict[str, int]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device; asynchronous from pinned memory."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            texts=self.texts.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), texts=self.texts.pin_memory())


class TrainData:
    """The training shards as an endless stream of batches.

    Args:
        config: Shards, lanes, workers, crop.
        image_size: Side of the images in pixels.
        context_length: Token ids per caption.
        global_batch_size: Pairs per step over all data-parallel ranks.
        seed: Of the order and of the augmentation.
        dp_rank, dp_size: Place on the data-parallel axis; tensor- and pipeline-parallel peers pass
            the same and see the same samples.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        context_length: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if global_batch_size <= 0 or global_batch_size % dp_size:
            raise ValueError(
                f"train.global_batch_size ({global_batch_size}) must be a positive multiple of the "
                f"data-parallel size ({dp_size})"
            )
        raise_file_limit()
        shards = find_shards(config.train)
        order = SampleOrder(
            [shard.num_samples for shard in shards],
            seed=seed,
            num_lanes=config.num_lanes,
            shuffle_shards=config.shuffle_shards,
        )
        #: Samples per epoch.
        self.num_samples = order.num_samples
        self._num_workers = config.num_workers
        lanes_per_rank = -(-config.num_lanes // dp_size) + 1
        reader = SampleReader(
            shards,
            ImageDecoder(image_size, crop_scale=config.crop_scale),
            CaptionTokenizer(context_length),
            seed=seed,
            open_shards=lanes_per_rank * config.shuffle_shards + 2,
        )
        self._dataset = _StepDataset(order, reader, global_batch_size, dp_rank, dp_size)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of steps ``start_step``, ``start_step + 1``, ... without end.

        The sequence is bit-identical for every number of workers, and for every ``start_step`` it
        goes on exactly where a run from step 0 would be. Workers end when the iterator is closed or
        collected.

        Raises:
            DataError: when samples and all candidates to replace them are bad.
            OSError: when the file system fails; that is no reason to replace samples.
        """
        loader = ordered_loader(self._dataset, _Steps(start_step), num_workers=self._num_workers)
        for item in loader:
            if isinstance(item, DataError):
                raise item
            yield item


class _StepDataset(Dataset[Batch | DataError]):
    """Maps a step number to this rank's part of its global batch."""

    def __init__(
        self,
        order: SampleOrder,
        reader: SampleReader,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self._order = order
        self._reader = reader
        self._global_batch_size = global_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __getitem__(self, step: int) -> Batch | DataError:
        positions = self._order.step_positions(
            step,
            global_batch_size=self._global_batch_size,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
        )
        shards, indices = self._order.locate(positions)
        samples, skipped = [], Counter[str]()
        try:
            for place in zip(positions.tolist(), shards.tolist(), indices.tolist(), strict=True):
                sample, cause = self._reader.read(*place)
                samples.append(sample)
                if cause is not None:
                    skipped[cause] += 1
        except DataError as error:
            return error  # as a value: raised in a worker, it would arrive as a traceback
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            texts=torch.stack([sample.tokens for sample in samples]),
            keys=[sample.key for sample in samples],
            captions=[sample.caption for sample in samples],
            skipped=dict(skipped),
        )


class _Steps(Sampler[int]):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def ordered_loader(
    dataset: Dataset[_Item], sampler: Sampler[int], *, num_workers: int
) -> DataLoader[_Item]:
    """A DataLoader whose items are whole batches, in the sampler's order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        # Without one of its own, the loader draws a seed from the global generator.
        generator=torch.Generator(),
    )


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C is the training process's to handle; it ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

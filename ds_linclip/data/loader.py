"""Training batches: this rank's part of every global batch, decoded by worker processes.

Every worker decodes its part of every batch, which keeps few batches in memory and lets few workers
read the shards of a lane. The only state is the step number: :meth:`TrainData.batches` starts at
any step by seeking.
"""

import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ds_linclip.config import CaptionSource, Config, check_batch
from ds_linclip.data.caption_choice import CaptionChoice
from ds_linclip.data.captions import CaptionTokenizer
from ds_linclip.data.causes import printable
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.data.remote import Storage, is_remote, redact
from ds_linclip.data.sample_order import GroupSizes, SampleOrder
from ds_linclip.data.sample_reader import DataError, SampleReader, ShardProblem
from ds_linclip.data.shard_index import ShardGroup, raise_file_limit
from ds_linclip.data.tally import Tally
from ds_linclip.data.transforms import Normalizer, TrainTransform

__all__ = ["Batch", "TrainData"]

_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Batch:
    """Image-text pairs of one rank in one step."""

    images: Tensor  # [B, 3, H, W] float32, normalised
    texts: Tensor  # [B, L] int64 token ids
    #: Key of each sample within its shard.
    keys: list[str] = field(default_factory=list)
    #: The texts of the token ids.
    captions: list[str] = field(default_factory=list)
    #: Number of bad samples that were replaced in this batch, by cause.
    skipped: Tally = field(default_factory=Tally)
    #: Problems of the shards that were opened for this batch.
    problems: list[ShardProblem] = field(default_factory=list)
    #: Why this rank has no samples for the step; its images are NaN then.
    failure: Exception | None = None
    #: Captions that were drawn and cannot be used, so that another one of the sample was taken.
    captions_passed_over: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class _Part:
    """The part of a batch that one worker decodes.

    Its token ids, and then its pixels, share ``memory``, [B * (8 * L + 3 * H * W)] uint8: a second
    tensor would cost a round trip between processes.
    """

    memory: Tensor
    image_size: tuple[int, int]  # (H, W)
    keys: list[str]
    captions: list[str]
    skipped: Tally
    captions_passed_over: Tally
    problems: list[ShardProblem]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return _views(self.memory, len(self.keys), self.image_size)

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory; called by torch's DataLoader."""
        return replace(self, memory=self.memory.pin_memory())


class TrainData:
    """The training shards as an endless stream of batches.

    Args:
        config: The run's configuration.
        groups: Result of :func:`~ds_linclip.data.shard_index.find_shards`, the same on all ranks.
        dp_rank: This rank's place on the data-parallel axis. Tensor-, pipeline- and
            context-parallel peers have the same place and get the same samples.
        dp_size: Data-parallel size.

    Attributes:
        order: The mapping from positions to samples.
        identity: Settings that must not change when a run is resumed, by name.

    Raises:
        ValueError: naming the field, its value and the rule, for example when this rank cannot
            access the shards.
    """

    def __init__(
        self, config: Config, groups: Sequence[ShardGroup], *, dp_rank: int, dp_size: int
    ) -> None:
        data = config.data
        check_batch(config, dp_size)
        raise_file_limit()
        self.order = SampleOrder(
            [
                GroupSizes([shard.num_samples for shard in group.shards], group.samples_per_epoch)
                for group in groups
            ],
            seed=config.train.seed,
            num_lanes=data.num_lanes,
            shuffle_shards=data.shuffle_shards,
            with_replacement=data.sampling == "replacement",
        )
        urls = [shard.url for group in groups for shard in group.shards]
        self.identity: dict[str, Any] = {
            "number of samples in data.train": self.order.num_samples,
            "data.num_lanes": data.num_lanes,
            "data.shuffle_shards": data.shuffle_shards,
            "data.sampling": data.sampling,
            "order of data.train (from sizes, weights and seed)": self.order.fingerprint,
            "shards of data.train (from their names)": _names_digest(urls),
            "data.crop_scale": data.crop_scale,
            "data.resolutions": [asdict(resolution) for resolution in data.resolutions],
            "data.captions": [
                asdict(source) for source in data.captions if data.captions != [CaptionSource()]
            ],
        }
        storage = Storage(data.cache, data.network)
        storage.check(urls)
        _check_visible(urls, storage)
        self._config = config
        self._dp_rank, self._dp_size = dp_rank, dp_size
        local_size = config.train.global_batch_size // dp_size
        self._num_parts = max(1, min(data.num_workers, local_size))
        lanes_per_reader = -(-self.order.num_lanes // (dp_size * self._num_parts)) + 2
        self._reader = SampleReader(
            groups,
            storage,
            TrainTransform(data.crop_scale, seed=config.train.seed),
            CaptionChoice(data.captions, seed=config.train.seed),
            CaptionTokenizer(config.model.text.context_length),
            open_shards=lanes_per_reader * data.shuffle_shards + 2,
            max_bad_in_a_row=data.max_bad_in_a_row,
        )
        self._prefetches = any(map(is_remote, urls))
        self._ring: deque[Tensor] = deque()
        _check_shared_memory(config, local_size)

    def batches(
        self, start_step: int, device: torch.device | str = "cpu", skipped_batches: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of steps ``start_step``, ``start_step + 1``, ... without end.

        The sequence is bit-identical for every number of workers, and the same as the continuation
        of a run from step 0. Workers end when the iterator is closed or garbage-collected.

        Args:
            start_step: Number of finished optimizer steps.
            device: Device of images and texts.
            skipped_batches: Number of global batches to skip in the order; image sizes still follow
                the step.

        Raises:
            DataError: when a sample and all candidates to replace it are bad, or when the file
                system or the network fails.
        """
        places = (
            (step, step + skipped_batches, part)
            for step in itertools.count(start_step)
            for part in range(self._num_parts)
        )
        loaded = ordered_map(
            self._read,
            places,
            num_workers=min(self._config.data.num_workers, self._num_parts),
            prefetch_factor=self._config.data.prefetch_batches,
        )
        device = torch.device(device)
        normalize = Normalizer(device)
        parts: list[_Part] = []
        for part in loaded:
            parts.append(part)
            if len(parts) == self._num_parts:
                batch = _joined(parts, normalize, device)
                parts.clear()
                del part  # otherwise its memory stays in use during the step
                yield batch

    def _read(self, place: tuple[int, int, int]) -> _Part:
        """Decode a part of this rank's batch: place is (step, batch number, part number)."""
        step, batch, part = place
        size = self._config.train.global_batch_size
        positions = self.order.step_positions(
            batch, global_batch_size=size, dp_rank=self._dp_rank, dp_size=self._dp_size
        )
        positions = np.array_split(positions, self._num_parts)[part]
        pools = self.order.pool_shards(positions)
        self._reader.keep(pools)
        if self._prefetches:
            self._reader.prefetch(pools)
            self._reader.prefetch(self.order.pool_shards(positions, following=True))
        image_size = self._config.image_size_at(step)
        bytes_per_sample = 8 * self._config.model.text.context_length + 3 * math.prod(image_size)
        memory = self._memory(len(positions) * bytes_per_sample)
        texts, images = _views(memory, len(positions), image_size)
        found = _Part(memory, image_size, [], [], Tally(), Tally(), [])
        places = zip(positions, *self.order.locate(positions), strict=True)
        for row, (position, shard, index) in enumerate(places):
            sample, replaced = self._reader.read(int(position), int(shard), int(index), image_size)
            images[row] = sample.image
            texts[row] = sample.tokens
            found.keys.append(sample.key)
            found.captions.append(sample.caption)
            for cause in sample.passed_over:
                found.captions_passed_over.add(cause, f"{printable(sample.key)} of {sample.shard}")
            if replaced is not None:
                found.skipped.add(*replaced)
        found.problems.extend(self._reader.problems)
        self._reader.problems.clear()
        return found

    def _memory(self, num_bytes: int) -> Tensor:
        """Return memory for one part; in a worker, shared with the training process.

        The DataLoader holds at most ``prefetch_batches`` finished parts of a worker, and a part is
        copied into its batch before the next one is fetched, so a ring of two more is enough.
        """
        if get_worker_info() is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        ahead = self._config.data.prefetch_batches
        memory = self._ring.popleft() if len(self._ring) == ahead + 2 else None
        if memory is None or len(memory) != num_bytes:
            try:
                memory = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
            except RuntimeError as error:
                raise DataError(
                    f"data.prefetch_batches ({ahead}) must fit into {_SHARED_MEMORY}, which is "
                    f"full (in Docker use --ipc=host or a larger --shm-size): {error}"
                ) from error
        self._ring.append(memory)
        return memory


def _views(memory: Tensor, num_samples: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] int64 and pixels [B, 3, H, W] uint8, channels last in memory."""
    first_pixel = len(memory) - num_samples * 3 * math.prod(image_size)
    texts = memory[:first_pixel].view(torch.int64).view(num_samples, -1)
    return texts, memory[first_pixel:].view(num_samples, *image_size, 3).permute(0, 3, 1, 2)


def _joined(parts: Sequence[_Part], normalize: Normalizer, device: torch.device) -> Batch:
    """Return one batch on ``device``, normalized there; asynchronous from pinned memory."""
    texts, images = zip(*(part.tensors() for part in parts), strict=True)
    skipped, captions_passed_over = Tally(), Tally()
    for part in parts:
        skipped.merge(part.skipped)
        captions_passed_over.merge(part.captions_passed_over)
    return Batch(
        images=normalize(images),
        texts=torch.cat([text.to(device, non_blocking=True) for text in texts]),
        keys=[key for part in parts for key in part.keys],
        captions=[caption for part in parts for caption in part.captions],
        skipped=skipped,
        captions_passed_over=captions_passed_over,
        problems=[problem for part in parts for problem in part.problems],
    )


def _names_digest(urls: Sequence[str]) -> str:
    """Return a digest of the shards' names with their last folder; higher folders may change."""
    names = ["/".join(redact(url).split("/")[-2:]) for url in urls]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _check_visible(urls: Sequence[str], storage: Storage) -> None:
    """Check before the first step that this node has the mount or the credentials."""
    some = urls[:: -(-len(urls) // 8)]
    try:
        if any(storage.exists(url) for url in some):
            return
    except OSError as error:
        raise ValueError(f"data.train ({redact(some[0])}) cannot be reached: {error}") from error
    raise ValueError(f"data.train ({redact(some[0])}) must be visible to every rank")


def _check_shared_memory(config: Config, local_size: int) -> None:
    """Check that the decoded batches fit: containers often have only 64 MiB of shared memory."""
    if config.data.num_workers == 0 or not os.path.isdir(_SHARED_MEMORY):
        return
    num_bytes = 3 * local_size * math.prod(config.largest_image_size)
    needed = (config.data.prefetch_batches + 2) * num_bytes
    space = os.statvfs(_SHARED_MEMORY)
    free = space.f_bavail * space.f_frsize
    if needed > free:
        raise ValueError(
            f"data.prefetch_batches ({config.data.prefetch_batches}) must fit into shared memory: "
            f"every rank needs {needed / 2**20:.0f} MiB of {_SHARED_MEMORY}, which has "
            f"{free / 2**20:.0f} MiB free; in Docker use --ipc=host or a larger --shm-size"
        )

"""Held-out image-text pairs in shards as those of training."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import accumulate

import torch

from ds_linclip.config import Config, Source
from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.causes import printable
from ds_linclip.data.eval.dataset import LabelledBatch
from ds_linclip.data.eval.unreadable import UnreadableImage, describe_unreadable
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.data.remote import Storage, redact
from ds_linclip.data.sample_reader import open_shard
from ds_linclip.data.shard_index import find_shards
from ds_linclip.data.tar_index import BadSample, OpenShard
from ds_linclip.data.transforms import MAX_IMAGE_BYTES, EvalTransform

__all__ = ["ImageTextShards"]


class ImageTextShards:
    """The first samples of the shards of ``eval.validation``, in their order.

    Batch b holds the samples from b * batch_size on, the same on any number of ranks. A bad sample
    is not replaced: it is listed among the unreadable ones of its batch. All labels are 0; every
    caption is one line.

    Attributes:
        num_samples: The number of samples, bad ones included.
        num_batches: The number of batches.

    Raises:
        ValueError: when the shards cannot be found or opened; while iterating, when one cannot be
            reached, or when too many samples are bad.
    """

    def __init__(self, config: Config, transform: EvalTransform) -> None:
        chosen, self._transform = config.eval.validation, transform
        self._name = f"eval.validation.shards ({redact(chosen.shards or '')})"
        self._storage = Storage(config.data.cache, config.data.network)
        source = Source(shards=chosen.shards or "")
        (group,) = find_shards([source], self._storage, field="eval.validation.shards")
        ends = list(accumulate(shard.num_samples for shard in group.shards))
        num_shards = bisect_right(ends[:-1], chosen.num_samples - 1) + 1
        self._shards, self._ends = group.shards[:num_shards], ends[:num_shards]
        self._storage.check([shard.url for shard in self._shards])
        self.num_samples = min(self._ends[-1], chosen.num_samples)
        if self.num_samples == 0:
            raise ValueError(f"{self._name} must hold at least one sample")
        self.batch_size, self._num_workers = config.eval.batch_size, config.data.num_workers
        self.num_batches = -(-self.num_samples // self.batch_size)
        self._max_bad = config.data.max_bad_samples
        self._open: tuple[int, OpenShard | BadSample] | None = None

    def batches(self, numbers: Sequence[int]) -> Iterator[LabelledBatch]:
        """Yield batches by their numbers, in the given order; workers end with the iterator.

        Raises:
            ValueError: for a shard that cannot be reached.
        """
        with closing(ordered_map(self._read, numbers, num_workers=self._num_workers)) as batches:
            yield from batches

    def require_readable(self, unreadable: Sequence[UnreadableImage]) -> None:
        """Check the number of bad samples that an iteration has found.

        Raises:
            ValueError: when they are a larger part than ``data.max_bad_samples``.
        """
        if len(unreadable) > self._max_bad * self.num_samples:
            raise ValueError(
                f"{self._name} must hold usable samples: {len(unreadable)} of {self.num_samples} "
                f"are bad (data.max_bad_samples is {self._max_bad}): "
                f"{describe_unreadable(unreadable)}"
            )

    def _read(self, number: int) -> LabelledBatch:
        """Decode a batch, in a worker."""
        first = number * self.batch_size
        pixels, keys, captions = [], [], []
        unreadable: list[UnreadableImage] = []
        for sample in range(first, min(first + self.batch_size, self.num_samples)):
            shard = bisect_right(self._ends, sample)
            index = sample - self._ends[shard] + self._shards[shard].num_samples
            url = redact(self._shards[shard].url)
            key = f"sample {index}"
            try:
                opened = self._open_shard(shard)
                if index < len(opened):
                    key = printable(opened.keys[index])
                text = decode_text(opened.read(index, "text", max_bytes=MAX_TEXT_BYTES))
                content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
                pixels.append(self._transform(content))
            except BadSample as error:
                unreadable.append(UnreadableImage(key, error.cause, f"{key} of {url}"))
                continue
            except OSError as error:
                raise ValueError(f"{self._name}: {url} cannot be read: {error}") from error
            keys.append(key)
            captions.append(" ".join(text.split()))
        return LabelledBatch(
            number=number,
            images=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            labels=torch.zeros(len(keys), dtype=torch.int64),
            keys=keys,
            captions=captions,
            unreadable_labels=torch.zeros(len(unreadable), dtype=torch.int64),
            unreadable=unreadable,
        )

    def _open_shard(self, number: int) -> OpenShard:
        """Return an open shard; the one before is closed.

        Raises:
            BadSample: when the shard is lost or broken.
            OSError: when it cannot be reached.
        """
        if self._open is None or self._open[0] != number:
            if self._open is not None and isinstance(self._open[1], OpenShard):
                self._open[1].close()
            self._open = None
            found, _ = open_shard(self._shards[number], self._storage)
            self._open = number, found
        shard = self._open[1]
        if isinstance(shard, BadSample):
            raise BadSample(shard.cause, whole_shard=True)
        return shard

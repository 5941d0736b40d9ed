"""(position, shard, index) -> one decoded sample, replacing bad ones.

A sample that cannot be used is replaced by the next good one: of the same shard first, of the next
shard after a few tries. The replacement depends on the data alone, so every run makes the same one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ds_linclip.data.decode import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    CaptionTokenizer,
    ImageDecoder,
    decode_text,
)
from ds_linclip.data.shards import BadSample, Shard, ShardCache

__all__ = ["DataError", "Sample", "SampleReader"]

_TRIES_PER_SHARD = 16
_TRIED_SHARDS = 8
_AUGMENTATION_STREAM = 2  # spawn key; 0 and 1 belong to the order


class DataError(ValueError):
    """The shards hold nothing usable where samples are needed."""


@dataclass(frozen=True)
class Sample:
    """One image-text pair.

    Attributes:
        image: [3, H, W] float32, normalised.
        tokens: [L] int64.
        key: Key within the shard.
        caption: Text the tokens come from.
    """

    image: Tensor
    tokens: Tensor
    key: str
    caption: str


class SampleReader:
    """Reads samples of the training shards.

    Args:
        shards: All shards.
        decode: With the training transform.
        tokenize: Of the model's context length.
        seed: Of the augmentation.
        open_shards: Shards held open at once.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        decode: ImageDecoder,
        tokenize: CaptionTokenizer,
        *,
        seed: int,
        open_shards: int,
    ) -> None:
        self._shards = shards
        self._decode = decode
        self._tokenize = tokenize
        self._seed = seed
        self._cache = ShardCache(shards, capacity=open_shards)

    def read(self, position: int, shard: int, index: int) -> tuple[Sample, str | None]:
        """The sample at a place of the order, or its replacement.

        Args:
            position: Global position; it alone decides the augmentation.
            shard: Shard number.
            index: Index within the shard.

        Returns:
            The sample, and why the one at this very place was bad (None: it was good).

        Raises:
            DataError: when all candidates for the replacement are bad.
        """
        first_cause: str | None = None
        tried = 0
        for number, candidates in self._candidates(shard, index):
            for candidate in candidates:
                tried += 1
                try:
                    return self._load(number, candidate, self._crop_seed(position)), first_cause
                except BadSample as error:
                    first_cause = first_cause or error.cause
                    if error.whole_shard:
                        break
        raise DataError(
            f"data.train ({self._shards[shard].path}) must hold usable samples: sample {index} and "
            f"{tried - 1} candidates to replace it are bad (first cause: {first_cause})"
        )

    def _load(self, shard: int, index: int, crop_seed: int) -> Sample:
        opened = self._cache.get(shard)
        caption = decode_text(opened.read(index, "text", max_bytes=MAX_TEXT_BYTES))
        content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
        image = self._decode(content, seed=crop_seed)
        return Sample(image, self._tokenize(caption), opened.keys[index], caption)

    def _candidates(self, shard: int, index: int) -> Iterator[tuple[int, list[int]]]:
        for step in range(min(_TRIED_SHARDS, len(self._shards))):
            number = (shard + step) % len(self._shards)
            size = self._shards[number].num_samples
            yield number, [(index + i) % size for i in range(min(_TRIES_PER_SHARD, size))]

    def _crop_seed(self, position: int) -> int:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(_AUGMENTATION_STREAM, position))
        return int(sequence.generate_state(1, np.uint64)[0])

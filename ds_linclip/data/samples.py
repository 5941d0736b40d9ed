"""(position, shard, index) -> one decoded sample, replacing bad ones.

A sample that cannot be used is replaced by the next good one: of the same shard first, of the next
shards of its group after a few tries. The replacement depends on the data alone, so every run makes
the same one. Only what is wrong with the data is replaced: a shard that cannot be reached ends the
run, or ranks that must see the same samples would drift apart.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_linclip.data.decode import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    CaptionTokenizer,
    TrainTransform,
    decode_text,
)
from ds_linclip.data.shards import Shard, ShardGroup
from ds_linclip.data.storage import Storage
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["DataError", "Sample", "SampleReader", "ShardProblem"]

logger = logging.getLogger(__name__)

_TRIES_PER_SHARD = 16
_FORGET_AFTER = 64  # parts of a batch


class DataError(ValueError):
    """The shards hold nothing usable where samples are needed, or cannot be reached."""


@dataclass(frozen=True)
class Sample:
    """One image-text pair.

    Attributes:
        image: [3, H, W] uint8.
        tokens: [L] int64.
        key: Key within the shard.
        caption: Text the tokens come from.
    """

    image: Tensor
    tokens: Tensor
    key: str
    caption: str


@dataclass(frozen=True)
class ShardProblem:
    """What is wrong with a shard as a whole.

    Attributes:
        url: The shard.
        cause: ``shard_missing``, ``shard_unreadable``, ``shard_cut``, ``shard_short``,
            ``shard_long`` (more samples than expected, those are never read) or ``keys_repeated``.
        found, expected: Number of samples; for ``keys_repeated``, of samples and of keys.
    """

    url: str
    cause: str
    found: int
    expected: int


class SampleReader:
    """Reads samples of the training shards.

    Args:
        groups: All shards, numbered through the groups.
        storage: Where they lie.
        transform: Of the images.
        tokenize: Of the model's context length.
        open_shards: Shards held open at once.
        max_bad_in_a_row: Candidates tried before giving up.

    Attributes:
        problems: What was found wrong with shards as they were opened; whoever reads it empties it.
    """

    def __init__(
        self,
        groups: Sequence[ShardGroup],
        storage: Storage,
        transform: TrainTransform,
        tokenize: CaptionTokenizer,
        *,
        open_shards: int,
        max_bad_in_a_row: int,
    ) -> None:
        self._shards = [shard for group in groups for shard in group.shards]
        self._bounds: list[tuple[int, int]] = []
        for group in groups:
            first = len(self._bounds)
            self._bounds += [(first, len(group.shards))] * len(group.shards)
        self._storage = storage
        self._transform = transform
        self._tokenize = tokenize
        self._max_bad_in_a_row = max_bad_in_a_row
        self._capacity = open_shards
        self._open: OrderedDict[int, tuple[OpenShard | BadSample, int]] = OrderedDict()
        self._part = 0
        self.problems: list[ShardProblem] = []

    def read(
        self, position: int, shard: int, index: int, image_size: tuple[int, int]
    ) -> tuple[Sample, str | None]:
        """The sample at a place of the order, or its replacement.

        Args:
            position: Global position; it alone decides the augmentation.
            shard: Shard number.
            index: Index within the shard.
            image_size: Height and width of the image.

        Returns:
            The sample, and why the one at this very place was bad (None: it was good).

        Raises:
            DataError: when all candidates for the replacement are bad, or a shard is out of reach.
        """
        first_cause: str | None = None
        tried = 0
        for number, candidates in self._candidates(shard, index):
            for candidate in candidates:
                try:
                    return self._load(position, number, candidate, image_size), first_cause
                except BadSample as error:
                    first_cause = first_cause or error.cause
                    tried += 1
                    if tried == self._max_bad_in_a_row:
                        raise DataError(self._all_bad(shard, index, tried, first_cause)) from error
                    if error.whole_shard:
                        break
        raise DataError(self._all_bad(shard, index, tried, first_cause))

    def start_part(self) -> None:
        """Close the shards that were not read for a while: copies of remote ones may then go."""
        self._part += 1
        while self._open and next(iter(self._open.values()))[1] < self._part - _FORGET_AFTER:
            self._close_oldest()

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have shards fetched that will be read soon."""
        self._storage.prefetch([self._shards[number].url for number in shards])

    def _load(self, position: int, number: int, index: int, image_size: tuple[int, int]) -> Sample:
        try:
            shard = self._shard(number)
            text = shard.read(index, "text", max_bytes=MAX_TEXT_BYTES)
            content = shard.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
        except OSError as error:
            url = self._shards[number].url
            raise DataError(f"data.train ({url}) cannot be read: {error}") from error
        caption = decode_text(text)
        image = self._transform(content, image_size, position)
        return Sample(image, self._tokenize(caption), shard.keys[index], caption)

    def _candidates(self, shard: int, index: int) -> Iterator[tuple[int, Sequence[int]]]:
        first, count = self._bounds[shard]
        for step in range(count):
            number = first + (shard - first + step) % count
            size = self._shards[number].num_samples
            yield number, [(index + i) % size for i in range(min(_TRIES_PER_SHARD, size))]

    def _all_bad(self, shard: int, index: int, tried: int, cause: str | None) -> str:
        return (
            f"data.train ({self._shards[shard].url}) must hold usable samples: from sample {index} "
            f"on, {tried} candidates in a row are bad (data.max_bad_in_a_row is "
            f"{self._max_bad_in_a_row}; first cause: {cause})"
        )

    def _shard(self, number: int) -> OpenShard:
        """An open shard; that it is lost or broken is remembered too, an OSError is not."""
        found, _ = self._open.pop(number, (None, 0))
        if found is None:
            found = self._open_shard(self._shards[number])
            if len(self._open) == self._capacity:
                self._close_oldest()
        self._open[number] = found, self._part
        if isinstance(found, BadSample):
            raise BadSample(found.cause, whole_shard=True)
        return found

    def _close_oldest(self) -> None:
        oldest, _ = self._open.popitem(last=False)[1]
        if isinstance(oldest, OpenShard):
            oldest.close()

    def _open_shard(self, shard: Shard) -> OpenShard | BadSample:
        found = _attempt(shard.url, self._storage, again=False)
        if isinstance(found, BadSample) or found.cut:
            found = _attempt(shard.url, self._storage, again=True)
        if isinstance(found, BadSample):
            self._report(shard, found.cause, 0, shard.num_samples)
            return found
        if found.cut:
            self._report(shard, "shard_cut", len(found), shard.num_samples)
        elif shard.exact and len(found) != shard.num_samples:
            cause = "shard_short" if len(found) < shard.num_samples else "shard_long"
            self._report(shard, cause, len(found), shard.num_samples)
        if found.repeated_keys:
            num_keys = len(found) - found.repeated_keys
            self._report(shard, "keys_repeated", len(found), num_keys)
        return found

    def _report(self, shard: Shard, cause: str, found: int, expected: int) -> None:
        logger.warning("%s: %s (%d found, %d expected)", shard.url, cause, found, expected)
        self.problems.append(ShardProblem(shard.url, cause, found, expected))


def _attempt(url: str, storage: Storage, *, again: bool) -> OpenShard | BadSample:
    try:
        return OpenShard(storage.open_again(url) if again else storage.open(url), url)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return BadSample("shard_missing", whole_shard=True)
    except BadSample as error:
        return error

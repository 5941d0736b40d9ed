"""Read and decode one sample at a time, replacing bad ones.

A bad sample is replaced by the next good one, first from the same shard, after a few tries from the
next shards of its group. The replacement depends only on the data, so every run chooses the same
one. Only bad data is replaced: an unreachable shard ends the run, because otherwise ranks that must
see the same samples would diverge.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_linclip.data.caption_choice import CaptionChoice
from ds_linclip.data.captions import CaptionTokenizer
from ds_linclip.data.causes import explain, printable
from ds_linclip.data.remote import Storage, redact
from ds_linclip.data.shard_index import Shard, ShardGroup
from ds_linclip.data.tar_index import BadSample, OpenShard
from ds_linclip.data.transforms import (
    MAX_IMAGE_BYTES,
    TrainTransform,
)

__all__ = ["DataError", "Sample", "SampleReader", "ShardProblem", "open_shard"]

logger = logging.getLogger(__name__)

_TRIES_PER_SHARD = 16


class DataError(ValueError):
    """The shards hold no usable samples, or cannot be reached."""


@dataclass(frozen=True)
class Sample:
    """One image-text pair."""

    image: Tensor  # [3, H, W] uint8
    tokens: Tensor  # [L] int64
    key: str  # within the shard
    caption: str  # the text of the tokens
    shard: str  # its URL without secrets
    #: Captions that were drawn before and cannot be used, see :class:`CaptionChoice`.
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardProblem:
    """A problem of a whole shard, or members of it that are passed over.

    Attributes:
        url: The shard's URL without secrets.
        cause: ``shard_missing``, ``shard_cut``, ``shard_short``, ``shard_long`` (samples beyond the
            expected number are never read), ``keys_repeated``, or a cause of
            :class:`~ds_linclip.data.tar_index.OpenShard`.
        found: Number of samples in the shard; of members that are passed over, their number.
        expected: Expected number of samples; for ``keys_repeated`` the number of distinct keys; for
            members that are passed over, none.
        first: Name of the first member that is passed over.
    """

    url: str
    cause: str
    found: int
    expected: int
    first: str = ""

    @property
    def is_of_members(self) -> bool:
        """Whether it says which members are passed over, which is no defect of the samples."""
        return bool(self.first)


class SampleReader:
    """Reads samples of the training shards.

    Args:
        groups: All shards, numbered consecutively over the groups.
        storage, transform, choose, tokenize: Open shards, decode images, choose captions, and
            tokenize them.
        open_shards: Maximum number of open shards.
        max_bad_in_a_row: Number of candidates to try for one sample.

    Attributes:
        problems: Problems of the shards opened so far; the reader of this list empties it.
    """

    def __init__(
        self,
        groups: Sequence[ShardGroup],
        storage: Storage,
        transform: TrainTransform,
        choose: CaptionChoice,
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
        self._choose = choose
        self._tokenize = tokenize
        self._max_bad_in_a_row = max_bad_in_a_row
        self._capacity = open_shards
        self._open: OrderedDict[int, OpenShard | BadSample] = OrderedDict()
        self._pools: dict[int, set[int]] = {}
        self.problems: list[ShardProblem] = []

    def read(
        self, position: int, shard: int, index: int, image_size: tuple[int, int]
    ) -> tuple[Sample, tuple[str, str] | None]:
        """Return a sample, or its replacement.

        Args:
            position: Global position; the augmentation depends on it and the seed only.
            shard, index: Number of the shard, and index within it.
            image_size: Height and width of the image.

        Returns:
            The sample, and None; or its replacement, and the cause and name of the bad sample.

        Raises:
            DataError: when all candidates are bad, or a shard cannot be reached.
        """
        causes: list[str] = []
        name, lost = "", None
        for number, candidate in self._candidates(shard, index):
            if number == lost:
                continue
            try:
                sample = self._load(position, number, candidate, image_size)
                return sample, (causes[0], name) if causes else None
            except BadSample as error:
                name = name or self._name(number, candidate)
                causes.append(error.cause)
                lost = number if error.whole_shard else None
                if len(causes) == self._max_bad_in_a_row:
                    break
        raise DataError(
            f"data.train ({redact(self._shards[shard].url)}) must hold usable samples: from sample "
            f"{index} on, {len(causes)} candidates in a row are bad (data.max_bad_in_a_row is "
            f"{self._max_bad_in_a_row}, the first cause {explain(causes[0])})"
        )

    def keep(self, pools: Mapping[int, set[int]]) -> None:
        """Close the shards that lanes no longer need, so that the cache may evict them.

        ``pools`` has the current shards of some lanes; other lanes keep theirs.
        """
        for lane, shards in pools.items():
            for number in self._pools.get(lane, set()) - shards:
                self._close(number)
            self._pools[lane] = shards

    def prefetch(self, pools: Mapping[int, set[int]]) -> None:
        """Start downloading shards that some lanes will read soon."""
        numbers = sorted(set().union(*pools.values()))
        self._storage.prefetch([self._shards[number].url for number in numbers])

    def _load(self, position: int, number: int, index: int, image_size: tuple[int, int]) -> Sample:
        url = redact(self._shards[number].url)
        try:
            shard = self._shard(number)
            if not self._shards[number].exact and len(shard):
                index %= len(shard)  # a shard of unknown size may be shorter than assumed
            caption = self._choose(shard, index, position)
            content = shard.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
        except OSError as error:
            raise DataError(f"data.train ({url}) cannot be read: {error}") from error
        image = self._transform(content, image_size, position)
        tokens = self._tokenize(caption.text)[0]
        return Sample(image, tokens, shard.keys[index], caption.text, url, caption.passed_over)

    def _name(self, number: int, index: int) -> str:
        """Return the name of a bad sample for messages."""
        shard, url = self._open.get(number), redact(self._shards[number].url)
        if isinstance(shard, OpenShard) and index < len(shard):
            return f"{printable(shard.keys[index])} of {url}"
        return f"sample {index} of {url}"

    def _candidates(self, shard: int, index: int) -> Iterator[tuple[int, int]]:
        """Yield shard and index of a sample, and of those that may replace it."""
        first, count = self._bounds[shard]
        for step in range(count):
            number = first + (shard - first + step) % count
            size = self._shards[number].num_samples
            for i in range(min(_TRIES_PER_SHARD, size)):
                yield number, (index + i) % size

    def _shard(self, number: int) -> OpenShard:
        """Return an open shard; remember also that it is lost or broken, but not an OSError."""
        found = self._open.get(number)
        if found is None:
            found, problems = open_shard(self._shards[number], self._storage, self._choose.members)
            for problem in problems:
                if not problem.is_of_members:
                    logger.warning(
                        "%s: %s: %d found, %d expected",
                        *(problem.url, explain(problem.cause), problem.found, problem.expected),
                    )
            self.problems += problems
            if len(self._open) == self._capacity:
                self._close(next(iter(self._open)))
            self._open[number] = found
        self._open.move_to_end(number)
        if isinstance(found, BadSample):
            raise BadSample(found.cause, whole_shard=True)
        return found

    def _close(self, number: int) -> None:
        shard = self._open.pop(number, None)
        if isinstance(shard, OpenShard):
            shard.close()


def open_shard(
    shard: Shard, storage: Storage, members: Sequence[str] = ()
) -> tuple[OpenShard | BadSample, list[ShardProblem]]:
    """Open a shard, a second time (from its source) if it is damaged, and list its problems.

    Args:
        shard, storage: The shard, and what opens it.
        members: Further members, see :class:`~ds_linclip.data.tar_index.OpenShard`.

    Returns:
        The shard, or the reason why it cannot be read; and its problems.

    Raises:
        OSError: when it cannot be reached.
    """
    found = _open(shard.url, storage, members, refetch=False)
    if isinstance(found, BadSample) or found.cut:
        if isinstance(found, OpenShard):
            found.close()
        found = _open(shard.url, storage, members, refetch=True)
    name = redact(shard.url)
    problems = [
        ShardProblem(name, cause, number, 0, printable(found.passed_over.examples[cause]))
        for cause, number in found.passed_over.items()
    ]
    if isinstance(found, BadSample):
        if not (found.cause == "shard_empty" and shard.exact and shard.num_samples == 0):
            problems.append(ShardProblem(name, found.cause, 0, shard.num_samples))
        return found, problems
    if found.cut:
        problems.append(ShardProblem(name, "shard_cut", len(found), shard.num_samples))
    elif shard.exact and len(found) != shard.num_samples:
        cause = "shard_short" if len(found) < shard.num_samples else "shard_long"
        problems.append(ShardProblem(name, cause, len(found), shard.num_samples))
    if found.repeated_keys:
        num_keys = len(found) - found.repeated_keys
        problems.append(ShardProblem(name, "keys_repeated", len(found), num_keys))
    return found, problems


def _open(
    url: str, storage: Storage, members: Sequence[str], *, refetch: bool
) -> OpenShard | BadSample:
    try:
        return OpenShard(storage.open(url, refetch=refetch), url, members)
    except FileNotFoundError:
        return BadSample("shard_missing", whole_shard=True)
    except BadSample as error:
        return error

"""The shards of a run: the files that the sources name, and the number of samples in each.

The layout is img2dataset's, as in LAION-400M. ``NNNNN.tar`` holds ``KEY.jpg``, ``KEY.txt`` and
``KEY.json``; ``NNNNN_stats.json`` beside it, written last, holds the number of samples. A
``sizes.json`` in the folder (webdataset's convention: file name -> samples) saves reading one file
per shard.
"""

import contextlib
import io
import json
import logging
import os
import re
import resource
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand

from ds_linclip.config import Source
from ds_linclip.data.causes import explain
from ds_linclip.data.remote import Storage, check_url, is_remote, redact
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["Shard", "ShardGroup", "expand", "find_shards", "raise_file_limit"]

logger = logging.getLogger(__name__)

_PARALLEL_REQUESTS = 32  # network storage has a high latency
_MAX_COUNTED_BY_HEADERS = 256  # counting takes a few hundred ms per shard


@dataclass(frozen=True)
class Shard:
    """A tar's path or URL, and its number of samples: exact, or the mean over its source."""

    url: str
    num_samples: int
    exact: bool = True


@dataclass(frozen=True)
class ShardGroup:
    """Shards that are shuffled together, in the config's order, and their samples per epoch."""

    shards: list[Shard]
    samples_per_epoch: int


def find_shards(
    sources: Sequence[Source],
    storage: Storage,
    *,
    count_headers: bool = True,
    field: str = "data.train",
) -> list[ShardGroup]:
    """Expand the patterns of all sources and find the number of samples of every shard.

    The number comes from the first of these that exists: ``sizes.json``, ``NNNNN_stats.json``, the
    successful rows of ``NNNNN.parquet``, ``num_samples`` of the source (spread evenly), or, for a
    few local files, the headers of the tar itself. With weights every source forms its own group;
    otherwise sources of equal ``upsampling`` form one.

    Args:
        sources: ``data.train`` of the config.
        storage: Opens the files.
        count_headers: Whether to count headers; otherwise a shard of unknown size has 0 samples and
            is not exact.
        field: The key of the config that names the sources, for messages.

    Returns:
        The groups, in the order of the sources.

    Raises:
        ValueError: naming ``data.train`` and the pattern: it cannot be expanded, a file does not
            exist, comes twice or cannot be reached, or its size is unknown or contradictory.
    """
    found: list[list[Shard]] = []
    for source in sources:
        name = f"{field} ({redact(source.shards)})"
        try:
            found.append(_Sizes(source, storage, name).shards(count_headers=count_headers))
        except OSError as error:
            raise ValueError(f"{name} cannot be reached: {error}") from error
        except ValueError as error:
            if str(error).startswith(("data.", field)):
                raise
            raise ValueError(f"{name} cannot be read: {error}") from error
    urls = Counter(shard.url for shards in found for shard in shards)
    url, times = urls.most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"{field} ({redact(url)}) must come once, not {times} times; set upsampling to "
            "repeat its samples"
        )
    if sources[0].weight is not None:
        return _by_weight(sources, found)
    groups: dict[float, list[Shard]] = {}
    for source, shards in zip(sources, found, strict=True):
        groups.setdefault(source.upsampling, []).extend(shards)
    return [
        ShardGroup(shards, round(upsampling * _total(shards)))
        for upsampling, shards in groups.items()
    ]


def raise_file_limit() -> None:
    """Raise the limit of open files to the system's maximum, for this process and later workers.

    A rank keeps all shards of its lanes' pools open; the usual soft limit is 1024.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):  # some systems report a limit that they refuse to set
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _total(shards: Sequence[Shard]) -> int:
    return sum(shard.num_samples for shard in shards)


def _by_weight(sources: Sequence[Source], found: Sequence[list[Shard]]) -> list[ShardGroup]:
    """Return groups with weighted shares of an epoch that has as many samples as all sources."""
    weights = [source.weight or 0.0 for source in sources]
    total = sum(map(_total, found))
    ends = [round(total * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    shares = [end - start for start, end in pairwise(ends)]
    return list(map(ShardGroup, found, shares))


class _Sizes:
    """The number of samples in every shard of one source."""

    def __init__(self, source: Source, storage: Storage, name: str) -> None:
        self._source, self._storage, self._name = source, storage, name
        # Some stores refuse access to files that do not exist.
        self._read = partial(storage.read, refused_is_absent=True)
        self._urls = expand(source.shards, name)

    def shards(self, *, count_headers: bool) -> list[Shard]:
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            counts = self._counts_beside(pool)
            # Statistics are written last, so a remote shard with statistics exists.
            unsure = [url for url in self._urls if url not in counts or not is_remote(url)]
            exist = pool.map(self._storage.exists, unsure)
            missing = [url for url, there in zip(unsure, exist, strict=True) if not there]
            if len(missing) == len(self._urls):
                raise ValueError(f"{self._name} matches no file")
            if missing:
                raise ValueError(
                    f"{self._name} must name existing files: {len(missing)} of {len(self._urls)} "
                    f"are missing, first {redact(missing[0])}"
                )
            unknown = [url for url in self._urls if url not in counts]
            if unknown and self._source.num_samples is None and count_headers:
                self._check_few(unknown)
                counts |= zip(unknown, pool.map(self._count_headers, unknown), strict=True)
                unknown = []
        shards = {url: Shard(url, count) for url, count in counts.items()}
        if self._source.num_samples is not None:
            shards |= self._spread(unknown, self._source.num_samples, sum(counts.values()))
        else:
            shards |= {url: Shard(url, 0, exact=False) for url in unknown}
        return [shards[url] for url in self._urls]

    def _counts_beside(self, pool: ThreadPoolExecutor) -> dict[str, int]:
        """Return the counts of the shards that have one in a file beside them."""
        counts: dict[str, int] = {}
        folders: dict[str, list[str]] = {}
        for url in self._urls:
            path, query = _split_query(url)
            folder, slash, _ = path.rpartition("/")
            folders.setdefault(f"{folder}{slash}sizes.json{query}", []).append(url)
        for folder, urls in folders.items():
            sizes = self._read_json(folder) or {}
            for url in urls:
                size = sizes.get(_split_query(url)[0].rpartition("/")[2])
                if size is not None:
                    counts[url] = self._as_count(size, folder)
        ends = {self._urls[0], self._urls[-1]}
        for url in ends & counts.keys():
            stats = self._count_beside(url)
            if stats not in (None, counts[url]):
                raise ValueError(
                    f"{self._name}: sizes.json ({counts[url]}) and _stats.json ({stats}) must "
                    f"agree on {redact(url)}"
                )
        rest = [url for url in self._urls if url not in counts]
        if rest and self._source.num_samples is not None:
            # Avoid tens of thousands of useless requests: if the first and the last shard have no
            # file beside them, assume that none has.
            rest = rest if any(self._count_beside(url) is not None for url in ends) else []
        found = zip(rest, pool.map(self._count_beside, rest), strict=True)
        return counts | {url: count for url, count in found if count is not None}

    def _count_beside(self, url: str) -> int | None:
        """Return the number of samples from the statistics or the parquet file beside a shard."""
        path, query = _split_query(url)
        stem = path.removesuffix(".tar")
        stats = self._read_json(f"{stem}_stats.json{query}")
        if stats is not None:
            return self._as_count(stats.get("successes"), f"{stem}_stats.json")
        content = self._read(f"{stem}.parquet{query}")
        if content is None:
            return None
        try:
            status = pq.read_table(io.BytesIO(content), columns=["status"])["status"]
        except (pa.ArrowException, KeyError) as error:
            raise ValueError(
                f"{self._name}: {redact(stem)}.parquet must be readable: {error}"
            ) from error
        return status.to_pylist().count("success")

    def _read_json(self, url: str) -> dict[str, int] | None:
        content = self._read(url)
        if content is None:
            return None
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self._name}: {redact(url)} must be readable JSON: {error}"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{self._name}: {redact(url)} must hold an object with numbers")
        return values

    def _as_count(self, value: object, url: str) -> int:
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"{self._name}: {redact(url)} must hold numbers of samples; it has {value!r}"
            )
        return value

    def _check_few(self, unknown: Sequence[str]) -> None:
        """Check that the headers can be counted: only those of a few local shards are."""
        what = f"{len(unknown)} of {len(self._urls)} shards (first: {redact(unknown[0])})"
        if any(map(is_remote, unknown)):
            raise ValueError(
                f"{self._name}: {what} must have sizes.json, _stats.json or a parquet file beside "
                "them, or the source num_samples, for the number of their samples"
            )
        if len(unknown) > _MAX_COUNTED_BY_HEADERS:
            raise ValueError(
                f"{self._name}: {what} must have a file beside them with the number of samples; "
                "linclip shards inspect --no-decode --write-sizes writes it"
            )
        logger.warning("%s have neither sizes.json nor _stats.json and may be incomplete", what)

    def _count_headers(self, url: str) -> int:
        try:
            shard = OpenShard(self._storage.open(url), url)
        except OSError as error:
            raise ValueError(f"{self._name}: {url} must be a readable tar: {error}") from error
        except BadSample as error:
            causes = "; ".join([explain(error.cause), *error.passed_over.describe()])
            raise ValueError(f"{self._name}: {url} must be a readable tar: {causes}") from error
        shard.close()
        return len(shard)

    def _spread(self, urls: Sequence[str], total: int, known: int) -> dict[str, Shard]:
        """Return the shards of unknown size, with equal shares of the remaining ``num_samples``."""
        if total < known or (total > known and not urls):
            rule = "be at least" if urls else "equal"
            raise ValueError(
                f"{self._name}: num_samples ({total}) must {rule} the number of samples in the "
                f"files beside the shards ({known})"
            )
        ends = [0, *((total - known) * (i + 1) // len(urls) for i in range(len(urls)))]
        shares = zip(urls, pairwise(ends), strict=True)
        return {url: Shard(url, end - start, exact=False) for url, (start, end) in shares}


def expand(pattern: str, name: str) -> list[str]:
    """Return the paths or URLs of a pattern with braces as in bash: ``{00..19}``, ``{a,b}``.

    Raises:
        ValueError: with ``name`` for the pattern: it is invalid, or a URL cannot be used.
    """
    if not is_remote(pattern):
        pattern = os.path.expanduser(pattern)
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{name} must be a valid brace pattern") from error
    for url in {url.partition(":")[0]: url for url in urls if ":" in url}.values():
        check_url(url)
    return urls


def _split_query(url: str) -> tuple[str, str]:
    """Split a URL into the file's address and the query or fragment after it."""
    match = re.match(r"([^?#]*)(.*)", url) if is_remote(url) else None
    return (match[1], match[2]) if match else (url, "")

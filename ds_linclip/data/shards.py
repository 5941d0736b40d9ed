"""The shards of a run: which files the sources name, and how many samples each one holds.

Layout: img2dataset, as of LAION-400M. ``NNNNN.tar`` holds ``KEY.jpg``, ``KEY.txt``, ``KEY.json``;
``NNNNN_stats.json`` beside it, written last, holds the number of samples. ``sizes.json`` in the
folder (webdataset's habit: file name -> samples) spares asking for each of them.
"""

import contextlib
import io
import json
import logging
import resource
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand

from ds_linclip.config import Source
from ds_linclip.data.storage import Storage, check_url, is_remote
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["Shard", "ShardGroup", "find_shards", "raise_file_limit"]

logger = logging.getLogger(__name__)

_MAX_SIDE_FILE_BYTES = 2**28
_REQUESTS_AT_ONCE = 32  # network storage answers slowly but many at once


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        url: Path or URL.
        num_samples: Samples it should hold.
        exact: The number was counted; otherwise it is the mean over the source.
    """

    url: str
    num_samples: int
    exact: bool = True


@dataclass(frozen=True)
class ShardGroup:
    """Shards that are shuffled as one.

    Attributes:
        shards: In the order of the config.
        samples_per_epoch: How many of their samples an epoch takes.
    """

    shards: list[Shard]
    samples_per_epoch: int


def find_shards(sources: Sequence[Source], storage: Storage) -> list[ShardGroup]:
    """Expand the patterns of all sources and learn how many samples each shard holds.

    The number comes from ``sizes.json``, else ``NNNNN_stats.json``, else the successful rows of
    ``NNNNN.parquet``, else ``num_samples`` of the source, spread evenly, else, for local files, the
    headers of the tar itself. With weights every source is a group of its own; otherwise those of
    equal ``upsampling`` make one.

    Raises:
        ValueError: naming ``data.train`` and the pattern: it cannot be expanded, names a file that
            does not exist, cannot be reached, nothing tells its size, or the sizes disagree.
    """
    found = []
    for source in sources:
        try:
            found.append(_count_source(source, storage))
        except OSError as error:
            raise ValueError(f"data.train ({source.shards}) cannot be reached: {error}") from error
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
    """Let this process, and workers it starts later, open as many files as the system allows.

    A rank holds all shards of its lanes' pools open; the usual soft limit is 1024.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _total(shards: Sequence[Shard]) -> int:
    return sum(shard.num_samples for shard in shards)


def _by_weight(sources: Sequence[Source], found: Sequence[list[Shard]]) -> list[ShardGroup]:
    """Shares of an epoch that is as long as all sources together."""
    weights = [source.weight or 0.0 for source in sources]
    total = sum(map(_total, found))
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
    starts = [0, *ends[:-1]]
    return [
        ShardGroup(shards, end - start)
        for shards, start, end in zip(found, starts, ends, strict=True)
    ]


def _count_source(source: Source, storage: Storage) -> list[Shard]:
    urls = _expand(source.shards)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        counts = _sizes_files(urls, storage)
        for url in {urls[0], urls[-1]} & counts.keys():
            _check_equal(
                f"data.train ({url}): sizes.json", counts[url], _count_beside(storage, url)
            )
        ask = [url for url in urls if url not in counts]
        answers = zip(ask, pool.map(partial(_count_beside, storage), ask), strict=True)
        counts |= {url: count for url, count in answers if count is not None}
        # Statistics are written last: a remote shard that has them is there.
        unsure = [url for url in urls if url not in counts or not is_remote(url)]
        _check_existing(source.shards, urls, unsure, list(pool.map(storage.exists, unsure)))
        unknown = [url for url in urls if url not in counts]
        if unknown and source.num_samples is None:
            _warn_unvouched(unknown, len(urls))
            counts |= zip(unknown, pool.map(partial(_count_headers, storage), unknown), strict=True)
            unknown = []
    shards = {url: Shard(url, count) for url, count in counts.items()}
    if source.num_samples is not None:
        shards |= _spread(source, unknown, sum(counts.values()))
    return [shards[url] for url in urls]


def _spread(source: Source, urls: Sequence[str], known: int) -> dict[str, Shard]:
    """Shards of unknown size, sharing evenly what ``num_samples`` leaves for them."""
    total = source.num_samples or 0
    if total < known or (total > known and not urls):
        rule = "be at least" if urls else "equal"
        raise ValueError(
            f"data.train ({source.shards}): num_samples ({total}) must {rule} the number of "
            f"samples told beside the shards ({known})"
        )
    ends = [(total - known) * (i + 1) // len(urls) for i in range(len(urls))]
    starts = [0, *ends[:-1]]
    return {
        url: Shard(url, end - start, exact=False)
        for url, start, end in zip(urls, starts, ends, strict=True)
    }


def _expand(pattern: str) -> list[str]:
    check_url(pattern)
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"data.train ({pattern}) must be a valid brace pattern") from error


def _check_existing(
    pattern: str, urls: Sequence[str], unsure: Sequence[str], exists: Sequence[bool]
) -> None:
    missing = [url for url, found in zip(unsure, exists, strict=True) if not found]
    if len(missing) == len(urls):
        raise ValueError(f"data.train ({pattern}) matches no file")
    if missing:
        raise ValueError(
            f"data.train ({pattern}) must name existing files: {len(missing)} of {len(urls)} are "
            f"missing, first {missing[0]}"
        )


def _check_equal(name: str, value: int, expected: int | None) -> None:
    if expected is not None and value != expected:
        raise ValueError(f"{name} ({value}) must equal what _stats.json says ({expected})")


def _warn_unvouched(urls: Sequence[str], num_shards: int) -> None:
    logger.warning(
        "%d of %d shards have neither sizes.json nor _stats.json (first: %s) and may be incomplete",
        len(urls),
        num_shards,
        urls[0],
    )


def _sizes_files(urls: Iterable[str], storage: Storage) -> dict[str, int]:
    """Samples of the shards that a ``sizes.json`` in their folder lists."""
    counts: dict[str, int] = {}
    folders: dict[str, dict[str, int]] = {}
    for url in urls:
        folder, slash, name = url.rpartition("/")
        if folder not in folders:
            folders[folder] = _read_json(storage, f"{folder}{slash}sizes.json") or {}
        if name in folders[folder]:
            counts[url] = _as_count(folders[folder][name], f"{folder}{slash}sizes.json")
    return counts


def _count_beside(storage: Storage, url: str) -> int | None:
    """Number of samples by the statistics or the parquet file beside a shard."""
    stem = url.removesuffix(".tar")
    stats = _read_json(storage, f"{stem}_stats.json")
    if stats is not None:
        return _as_count(stats.get("successes"), f"{stem}_stats.json")
    content = storage.read(f"{stem}.parquet", _MAX_SIDE_FILE_BYTES)
    if content is None:
        return None
    try:
        status = pq.read_table(io.BytesIO(content), columns=["status"])["status"]
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"data.train ({stem}.parquet) must be readable: {error}") from error
    return status.to_pylist().count("success")


def _read_json(storage: Storage, url: str) -> dict[str, int] | None:
    content = storage.read(url, _MAX_SIDE_FILE_BYTES)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"data.train ({url}) must be readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"data.train ({url}) must hold an object with numbers")
    return values


def _as_count(value: object, url: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"data.train ({url}) must hold numbers of samples; it has {value!r}")
    return value


def _count_headers(storage: Storage, url: str) -> int:
    if is_remote(url):
        raise ValueError(
            f"data.train ({url}) must have sizes.json, _stats.json or a parquet file beside it, or "
            "num_samples in the config, to tell how many samples it holds"
        )
    try:
        shard = OpenShard(storage.open(url), url)
    except (BadSample, OSError) as error:
        raise ValueError(f"data.train ({url}) must be a readable tar: {error}") from error
    shard.close()
    return len(shard)

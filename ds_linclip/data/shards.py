"""Shards on disk: which files a pattern names, how many samples they hold, where each one lies.

Layout: img2dataset, as of LAION-400M. ``NNNNN.tar`` holds ``KEY.jpg``, ``KEY.txt``, ``KEY.json``;
``NNNNN_stats.json`` beside it, written last, holds the number of samples.
"""

import contextlib
import errno
import json
import logging
import os
import resource
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from braceexpand import braceexpand

__all__ = ["BadSample", "OpenShard", "Shard", "ShardCache", "find_shards", "raise_file_limit"]

logger = logging.getLogger(__name__)

Role = Literal["image", "text", "class", "meta"]

_ROLES: tuple[Role, ...] = ("image", "text", "class", "meta")
_ROLE_OF_EXTENSION: dict[str, Role] = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "webp": "image",
    "gif": "image",
    "txt": "text",
    "cls": "class",
    "json": "meta",
}

_MAX_MEMBER_BYTES = 2**50  # headers can name negative sizes and such that no int64 holds


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        cause: Short name under which it is counted.
        whole_shard: The other samples of the shard are bad too.
    """

    def __init__(self, cause: str, *, whole_shard: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.whole_shard = whole_shard


@dataclass(frozen=True)
class Shard:
    """A tar file and the number of samples it should hold."""

    path: str
    num_samples: int


def find_shards(patterns: Sequence[str]) -> list[Shard]:
    """Expand brace patterns and read how many samples each shard holds.

    The number comes from ``NNNNN_stats.json``, else from the successful rows of ``NNNNN.parquet``,
    else from the headers of the tar itself.

    Raises:
        ValueError: naming ``data.train`` and the pattern, when it cannot be expanded, is not a
            local path, or names a file that does not exist; or the statistics are unreadable.
    """
    paths: list[str] = []
    for pattern in patterns:
        paths += _expand(pattern)
    # Network file systems answer slowly but many at once.
    with ThreadPoolExecutor(max_workers=16) as pool:
        counted = list(pool.map(_count_samples, paths))
    without = [path for path, (_, exact) in zip(paths, counted, strict=True) if not exact]
    if without:
        logger.warning(
            "%d of %d shards have no _stats.json (first: %s) and may be incomplete",
            len(without),
            len(paths),
            without[0],
        )
    return [Shard(path, count) for path, (count, _) in zip(paths, counted, strict=True)]


def raise_file_limit() -> None:
    """Let this process, and workers it starts later, open as many files as the system allows.

    A rank holds all shards of its lanes' pools open; the usual soft limit is 1024.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OpenShard:
    """An open tar file and the place of every sample in it.

    A sample is a run of members with one key; the key is the name up to its known extension, so it
    may hold dots. A key that comes twice makes two samples. Members with other extensions are never
    read.

    Raises:
        BadSample: ``shard_missing`` or ``shard_unreadable``.
        OSError: for what says nothing about the shard: no more files can be opened, the file system
            is not answering.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.keys: list[str] = []
        places: list[list[tuple[int, int]]] = []
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise BadSample("shard_missing", whole_shard=True) from error
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                self._scan(tar, places)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            # EINVAL and the last two: a broken header points to where no file can reach.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                self._file.close()
                raise
            # A cut or broken tar: the members before that place are sound.
            if not places:
                self._file.close()
                raise BadSample("shard_unreadable", whole_shard=True) from error
        self._places = np.array(places, dtype=np.int64).reshape(len(places), len(_ROLES), 2)
        if len(set(self.keys)) < len(self.keys):
            repeated = len(self.keys) - len(set(self.keys))
            logger.warning("%s: %d keys come more than once; all kept", path, repeated)

    def _scan(self, tar: tarfile.TarFile, places: list[list[tuple[int, int]]]) -> None:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined] # or tarfile keeps every header
            if not 0 <= member.size <= _MAX_MEMBER_BYTES:
                raise tarfile.ReadError(f"size of {member.name} ({member.size}) is no size")
            key, _, extension = member.name.rpartition(".")
            role = _ROLE_OF_EXTENSION.get(extension.lower())
            if role is None or not member.isreg() or member.issparse():
                continue
            column = _ROLES.index(role)
            if not self.keys or self.keys[-1] != key or places[-1][column][0] >= 0:
                self.keys.append(key)
                places.append([(-1, 0)] * len(_ROLES))
            places[-1][column] = (member.offset_data, member.size)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, index: int, role: Role, *, max_bytes: int) -> tuple[int, int]:
        """Offset and size in bytes of one member of the sample at ``index``; reads nothing.

        Raises:
            BadSample: ``shard_short`` (no such sample), ``<role>_missing`` or
                ``<role>_too_many_bytes``.
        """
        if index >= len(self.keys):
            raise BadSample("shard_short")
        offset, size = (int(value) for value in self._places[index, _ROLES.index(role)])
        if offset < 0:
            raise BadSample(f"{role}_missing")
        if size > max_bytes:
            raise BadSample(f"{role}_too_many_bytes")
        return offset, size

    def read(self, index: int, role: Role, *, max_bytes: int) -> bytes:
        """Bytes of one member of the sample at ``index``.

        Raises:
            BadSample: as :meth:`find`, or ``<role>_cut``.
            OSError: when the file system fails.
        """
        offset, size = self.find(index, role, max_bytes=max_bytes)
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise BadSample(f"{role}_cut")
        return content

    def close(self) -> None:
        self._file.close()


class ShardCache:
    """The most recently used open shards of one process.

    Args:
        shards: All shards.
        capacity: Shards held open at once.
    """

    def __init__(self, shards: Sequence[Shard], *, capacity: int) -> None:
        self._shards = shards
        self._capacity = capacity
        self._open: OrderedDict[int, OpenShard | BadSample] = OrderedDict()

    def get(self, number: int) -> OpenShard:
        """The shard with this number.

        Raises:
            BadSample: when it is lost or broken; that too is remembered.
            OSError: as :class:`OpenShard`; not remembered.
        """
        found = self._open.get(number)
        if found is None:
            found = self._open_shard(self._shards[number])
            self._open[number] = found
            if len(self._open) > self._capacity:
                oldest = self._open.popitem(last=False)[1]
                if isinstance(oldest, OpenShard):
                    oldest.close()
        self._open.move_to_end(number)
        if isinstance(found, BadSample):
            raise BadSample(found.cause, whole_shard=True)
        return found

    @staticmethod
    def _open_shard(shard: Shard) -> OpenShard | BadSample:
        try:
            opened = OpenShard(shard.path)
        except BadSample as error:
            logger.warning("%s: %s; all its samples are replaced", shard.path, error.cause)
            return error
        if len(opened) != shard.num_samples:
            logger.warning(
                "%s: %d samples found, %d expected", shard.path, len(opened), shard.num_samples
            )
        return opened


def _expand(pattern: str) -> list[str]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"data.train ({pattern}) must be a local path")
    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"data.train ({pattern}) must be a valid brace pattern") from error
    with ThreadPoolExecutor(max_workers=16) as pool:
        exists = list(pool.map(os.path.isfile, paths))
    missing = [path for path, found in zip(paths, exists, strict=True) if not found]
    if len(missing) == len(paths):
        raise ValueError(f"data.train ({pattern}) matches no file")
    if missing:
        raise ValueError(
            f"data.train ({pattern}) must name existing files: {len(missing)} of {len(paths)} are "
            f"missing, first {missing[0]}"
        )
    return paths


def _count_samples(path: str) -> tuple[int, bool]:
    """Number of samples, and whether a statistics file vouches for it."""
    stem = str(Path(path).with_suffix(""))
    try:
        with open(f"{stem}_stats.json", encoding="utf-8") as file:
            return int(json.load(file)["successes"]), True
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.train ({path}) must have a readable {stem}_stats.json: {error!r}"
        ) from error
    if os.path.isfile(f"{stem}.parquet"):
        status = pq.read_table(f"{stem}.parquet", columns=["status"])["status"]
        return status.to_pylist().count("success"), False
    try:
        shard = OpenShard(path)
    except (BadSample, OSError) as error:
        raise ValueError(f"data.train ({path}) must be a readable tar: {error}") from error
    shard.close()
    return len(shard), False

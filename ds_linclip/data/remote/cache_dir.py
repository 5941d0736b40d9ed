"""The folder of the local copies of remote files: its names, records, locks, and what it may hold.

``NAME`` holds a whole copy, ``NAME.partial`` what has come so far, ``NAME.lock`` a record of both:
size and version of the content, bytes reserved for it, the last failure. The locks are flocks,
which end with their process: exclusive on ``NAME.lock`` while one fetches (the others wait), shared
on ``NAME`` while it is open (so that nobody drops it), exclusive on the folder's lock while room is
counted or made. Files without a record are not ours and stay.
"""

import errno
import fcntl
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO

from ds_linclip.data.remote.backends import RemoteError, Version, shown

__all__ = ["CacheError", "CacheFolder", "Failure", "Record"]

_DATA, _PARTIAL, _LOCK = "", ".partial", ".lock"
_FILE = re.compile(r"([0-9a-f]{16}-[\w.-]+?)(\.partial|\.lock)?", re.ASCII)
_FOLDER_LOCK = "shard-cache.lock"
_GIB = 2**30
_WAIT = 0.2  # seconds between two looks for room
_MIN_LOOKS = 10  # others hold a file for a moment when they pass it on


class CacheError(OSError):
    """The folder of the copies cannot hold another one."""


@dataclass(frozen=True)
class Failure:
    """Why a file could not be had, for those who were waiting for it."""

    at: float  # of the system's clock
    absent: bool
    reason: str

    def raised(self, url: str) -> OSError:
        """It as who met it saw it."""
        if self.absent:
            return FileNotFoundError(errno.ENOENT, self.reason, shown(url))
        return RemoteError(self.reason)


@dataclass(frozen=True)
class Record:
    """What ``NAME.lock`` holds.

    Attributes:
        version: Of the copy, or of what has come of it.
        reserved: Bytes that it takes, or will take.
        confirmed: Whether this content was fetched once more and came out the same.
        failure: Of the last who tried in vain.
    """

    version: Version
    reserved: int
    confirmed: bool = False
    failure: Failure | None = None

    @classmethod
    def read(cls, file: int) -> "Record":
        """The record; an empty one when a killed process left none or half of one."""
        try:
            values = json.loads(os.pread(file, 2**16, 0))
            failure = values["failure"]
            return cls(
                Version(**values["version"]),
                int(values["reserved"]),
                bool(values["confirmed"]),
                None if failure is None else Failure(**failure),
            )
        except (ValueError, KeyError, TypeError):
            return cls(Version(), 0)

    def write(self, file: int) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self)).encode(), 0)


class CacheFolder:
    """Holds no state but the two settings.

    Args:
        path: On a local disk.
        max_gib: Largest size of all copies together, with those on their way.
    """

    def __init__(self, path: str, max_gib: float) -> None:
        self.path = path
        self._max_gib = max_gib
        self._max_bytes = int(max_gib * _GIB)

    def make(self) -> None:
        with self.local_errors():
            os.makedirs(self.path, exist_ok=True)

    def check(self) -> None:
        """Try whether it can be written."""
        with self.local_errors(), self._locked():
            pass

    def open_copy(self, name: str) -> BinaryIO | None:
        """The copy if it is whole."""
        try:
            with open(self._path(name, _LOCK), "rb") as file:
                record = Record.read(file.fileno())
            copy = _Copy(self._path(name, _DATA))
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(copy, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(copy.fileno())
            if status.st_nlink > 0 and status.st_size == record.version.size:
                with suppress(PermissionError):  # another user's copy
                    os.utime(copy.fileno())
                return io.BufferedReader(copy)
        except BlockingIOError:  # it is being dropped
            pass
        copy.close()
        return None

    def partial(self, name: str) -> str:
        """Path of what has come so far of an entry that the caller has locked."""
        return self._path(name, _PARTIAL)

    def reserve(
        self, name: str, lock: int, url: str, version: Version, size: int, *, wait: bool
    ) -> None:
        """Count ``size`` bytes for this entry, dropping copies that nobody has open.

        A process that waits here has no partial file yet, so two never wait for each other.
        """
        looks = 0  # since no file is coming any more: one that has come may still be locked
        while True:
            with self._locked():
                in_use, in_transfer = self._make_room(name, size)
                if in_use + size <= self._max_bytes:
                    Record(version, size).write(lock)
                    with open(self._path(name, _PARTIAL), "ab"):
                        return
            looks = 0 if in_transfer else looks + 1
            if size > self._max_bytes or not wait or looks >= _MIN_LOOKS:
                raise CacheError(
                    f"data.cache.max_gib ({self._max_gib}) must be at least what is in use at "
                    f"once: {in_use / _GIB:.3f} GiB are, {shown(url)} has {size / _GIB:.3f} GiB"
                )
            time.sleep(_WAIT)

    def commit(self, name: str, lock: int, version: Version, *, confirmed: bool) -> None:
        """The partial file is the whole copy."""
        assert version.size is not None
        with self._locked():
            Record(version, version.size, confirmed).write(lock)
            os.replace(self._path(name, _PARTIAL), self._path(name, _DATA))

    def drop_copy(self, name: str) -> None:
        """Of an entry that the caller has locked; who has it open keeps it."""
        self._remove(name, _DATA)

    def drop_partial(self, name: str) -> None:
        """Of an entry that the caller has locked."""
        with self._locked():
            self._remove(name, _PARTIAL)

    def drop_traces(self, name: str) -> None:
        """Of an entry without a copy that the caller has locked; who waits for it still waits."""
        with self._locked():
            self._remove(name, _PARTIAL, _LOCK)

    @contextmanager
    def entry_locked(self, name: str, url: str, *, wait: bool) -> Iterator[int]:
        """The entry's lock, open for its record.

        Raises:
            FileNotFoundError, RemoteError: another one met it while this one waited.
            BlockingIOError: another one has the lock, and ``wait`` is not set.
        """
        path, since = self._path(name, _LOCK), time.time()
        while True:
            with self.local_errors():
                lock = _locked(path, wait=wait)
            failure = Record.read(lock).failure
            failed = failure is not None and failure.at >= since
            if failed or _is_still(path, lock):
                break
            _unlock(lock)  # dropped while we waited
        try:
            if failed:
                assert failure is not None
                raise failure.raised(url)
            yield lock
        finally:
            _unlock(lock)

    @contextmanager
    def local_errors(self) -> Iterator[None]:
        try:
            yield
        except (CacheError, BlockingIOError):
            raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheError(
                    f"data.cache.max_gib ({self._max_gib}) must be less than what is free on the "
                    f"disk of data.cache.dir ({self.path}), which is full: {error}"
                ) from error
            raise CacheError(
                f"data.cache.dir ({self.path}) must be a folder on a local disk that can be "
                f"written: {error}"
            ) from error

    def _make_room(self, name: str, size: int) -> tuple[int, bool]:
        """Bytes that others still take after dropping, oldest first, and whether any are coming."""
        usages = self._usages()
        usages.pop(name, None)
        total, in_transfer = sum(usage.size for usage in usages.values()), False
        for other, usage in sorted(usages.items(), key=lambda item: item[1].used_at):
            if total + size <= self._max_bytes:
                break
            if self._drop(other):
                total -= usage.size
            else:
                in_transfer |= usage.partial
        return total, in_transfer

    def _usages(self) -> dict[str, "_Usage"]:
        usages: dict[str, _Usage] = {}
        recorded = set()
        with os.scandir(self.path) as items:
            for item in items:
                match = _FILE.fullmatch(item.name)
                if match is None:
                    continue
                name, suffix = match[1], match[2] or _DATA
                if suffix == _LOCK:
                    recorded.add(name)
                    continue
                usage = usages.setdefault(name, _Usage())
                with suppress(FileNotFoundError):
                    status = item.stat()
                    usage.size += status.st_size
                    usage.used_at = max(usage.used_at, status.st_mtime_ns)
                    if suffix == _PARTIAL:
                        usage.partial = True
                        usage.size += max(0, self._reserved(name) - status.st_size)
        return {name: usage for name, usage in usages.items() if name in recorded}

    def _reserved(self, name: str) -> int:
        try:
            with open(self._path(name, _LOCK), "rb") as file:
                return Record.read(file.fileno()).reserved
        except FileNotFoundError:
            return 0

    def _drop(self, name: str) -> bool:
        """Remove an entry unless somebody fetches it or has it open."""
        try:
            lock = os.open(self._path(name, _LOCK), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError), open(self._path(name, _DATA), "rb") as copy:
                # Held until the name is gone: who opens it meanwhile sees that it is dropped.
                fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(name, _DATA)
            self._remove(name, _PARTIAL, _LOCK)
            return True
        except BlockingIOError:
            return False
        finally:
            _unlock(lock)

    def _remove(self, name: str, *suffixes: str) -> None:
        for suffix in suffixes:
            with suppress(FileNotFoundError):
                os.unlink(self._path(name, suffix))

    def _path(self, name: str, suffix: str) -> str:
        return os.path.join(self.path, name + suffix)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = _locked(os.path.join(self.path, _FOLDER_LOCK))
        try:
            yield
        finally:
            _unlock(lock)


class _Copy(io.FileIO):
    """A whole copy, locked against dropping until it is closed by the process that opened it.

    A forked process shares the lock: what it closes must not free it for the other one, and what
    the other one closes must free it though the forked one never does.
    """

    def __init__(self, path: str) -> None:
        self._process = os.getpid()
        super().__init__(path, "rb")

    def close(self) -> None:
        if not self.closed and os.getpid() == self._process:
            fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


@dataclass
class _Usage:
    """What one entry takes."""

    size: int = 0
    used_at: int = 0
    partial: bool = False


def _locked(path: str, *, wait: bool = True) -> int:
    """A descriptor with an exclusive lock."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _unlock(file: int) -> None:
    # Closing would not do where a forked process has inherited the descriptor.
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _is_still(path: str, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False

"""Local copies of remote files, shared by all threads and processes that use one folder.

``NAME`` holds a whole copy, ``NAME.partial`` what has come so far, ``NAME.lock`` a record of both:
size and version of the content, bytes reserved for it. The locks are flocks, which end with their
process: exclusive on ``NAME.lock`` while one fetches (the others wait), shared on ``NAME`` while it
is open (so that nobody drops it), exclusive on the folder's lock while room is counted or made.
Files without a record are not ours and stay. A copy that is there is taken as it is: whether the
remote file has changed since is not asked.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

from ds_linclip.data.remote import RemoteError, Sink, Version, shown

__all__ = ["CacheError", "DiskCache"]

_DATA, _PARTIAL, _LOCK = "", ".partial", ".lock"
_FILE = re.compile(r"([0-9a-f]{16}-[\w.-]+?)(\.partial|\.lock)?", re.ASCII)
_FOLDER_LOCK = "shard-cache.lock"
_GIB = 2**30
_WAIT = 0.2  # seconds between two looks for room
_MIN_LOOKS = 10  # others hold a file for a moment when they pass it on


class CacheError(OSError):
    """The folder of the copies cannot hold another one."""


class DiskCache:
    """The copies in one folder. Holds no state but the two settings.

    Args:
        folder: On a local disk; made when there is none.
        max_gib: Largest size of all copies together, with those on their way.
    """

    def __init__(self, folder: str, max_gib: float) -> None:
        self._folder = folder
        self._max_gib = max_gib
        self._max_bytes = int(max_gib * _GIB)

    def check(self) -> None:
        """Make the folder and try whether it can be written.

        Raises:
            CacheError: naming ``data.cache.dir`` and what is wrong.
        """
        with self._local_errors():
            os.makedirs(self._folder, exist_ok=True)
            with self._folder_locked():
                pass

    def open(
        self, url: str, fetch: Callable[[Sink], None], *, anew: bool = False, wait: bool = True
    ) -> BinaryIO:
        """The copy of a file, fetched first when there is none; nobody drops it while it is open.

        Args:
            url: Names the file; equal URLs share a copy.
            fetch: Brings the whole file into the sink it is given, or raises.
            anew: Whether to drop the copy that is there.
            wait: Whether to wait for room that transfers on their way may give back.

        Raises:
            CacheError: no room (naming ``data.cache.max_gib``), or the folder or its disk is at
                fault (naming ``data.cache.dir``).
        """
        name = _name_of(url)
        with self._local_errors():
            os.makedirs(self._folder, exist_ok=True)
            found = None if anew else self._open_copy(name)
        if found is not None:
            return found
        with self._entry_locked(name) as lock:
            with self._local_errors():
                found = None if anew else self._open_copy(name)
                if found is None:
                    self._remove(name, _DATA, *([_PARTIAL] if anew else []))
            if found is None:
                self._fetch(name, lock, url, fetch, wait)
                with self._local_errors():
                    found = self._open_copy(name)
            if found is None:
                raise CacheError(
                    f"data.cache.dir ({self._folder}) must keep its files: the copy of "
                    f"{shown(url)} is gone at once"
                )
            return found

    def _fetch(
        self, name: str, lock: int, url: str, fetch: Callable[[Sink], None], wait: bool
    ) -> None:
        with self._local_errors():
            partial = _Partial(self, name, lock, url, wait)
        try:
            fetch(partial)
            partial.finish()
        except (OSError, ValueError) as error:
            # Bytes of a file that may come yet are gone on with by the next one to ask.
            if not isinstance(error, RemoteError) or partial.position == 0:
                with self._local_errors(), self._folder_locked():
                    self._remove(name, _PARTIAL, _LOCK)
            raise
        finally:
            partial.close()

    def _open_copy(self, name: str) -> BinaryIO | None:
        """The copy if it is whole."""
        try:
            with open(self._path(name, _LOCK), "rb") as file:
                record = _Record.read(file.fileno())
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

    def _reserve(
        self, name: str, lock: int, url: str, version: Version, size: int, *, wait: bool
    ) -> None:
        """Count ``size`` bytes for this entry, dropping copies that nobody has open.

        A process that waits here has no partial file yet, so two never wait for each other.
        """
        looks = 0
        while True:
            with self._folder_locked():
                in_use, in_transfer = self._make_room(name, size)
                if in_use + size <= self._max_bytes:
                    _Record(version, size).write(lock)
                    with open(self._path(name, _PARTIAL), "ab"):
                        return
            looks += 1
            if size > self._max_bytes or not wait or (looks >= _MIN_LOOKS and not in_transfer):
                raise CacheError(
                    f"data.cache.max_gib ({self._max_gib}) must be at least what is in use at "
                    f"once: {in_use / _GIB:.3f} GiB are, {shown(url)} has {size / _GIB:.3f} GiB"
                )
            time.sleep(_WAIT)

    def _commit(self, name: str, lock: int, version: Version, size: int) -> None:
        """The partial file is the whole copy."""
        final = Version(size=size, etag=version.etag, modified=version.modified)
        with self._folder_locked():
            _Record(final, size).write(lock)
            os.replace(self._path(name, _PARTIAL), self._path(name, _DATA))

    def _discard(self, name: str) -> None:
        """Drop the partial file of an entry that the caller has locked."""
        with self._folder_locked():
            self._remove(name, _PARTIAL)

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
        with os.scandir(self._folder) as items:
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
                return _Record.read(file.fileno()).reserved
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
        return os.path.join(self._folder, name + suffix)

    @contextmanager
    def _entry_locked(self, name: str) -> Iterator[int]:
        path = self._path(name, _LOCK)
        while True:
            with self._local_errors():
                lock = _locked(path)
            if _is_still(path, lock):
                break
            _unlock(lock)  # dropped while we waited
        try:
            yield lock
        finally:
            _unlock(lock)

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        lock = _locked(os.path.join(self._folder, _FOLDER_LOCK))
        try:
            yield
        finally:
            _unlock(lock)

    @contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheError(
                    f"data.cache.max_gib ({self._max_gib}) must be less than what is free on the "
                    f"disk of data.cache.dir ({self._folder}), which is full: {error}"
                ) from error
            raise CacheError(
                f"data.cache.dir ({self._folder}) must be a folder on a local disk that can be "
                f"written: {error}"
            ) from error


class _Partial:
    """The sink of one entry: its partial file, within what is reserved for it."""

    def __init__(self, cache: DiskCache, name: str, lock: int, url: str, wait: bool) -> None:
        self.version: Version | None = None
        self.position = 0
        self._cache, self._name, self._lock = cache, name, lock
        self._url, self._wait = url, wait
        self._reserved = 0
        self._file: BinaryIO | None = None
        path = cache._path(name, _PARTIAL)
        record = _Record.read(lock)
        if record.version.resumable and os.path.exists(path):
            self.version = record.version
            self.position = os.path.getsize(path)
            self._reserved = record.reserved
        else:
            cache._discard(name)

    def start(self, version: Version, offset: int) -> None:
        with self._cache._local_errors():
            self.close()
            if offset == 0 and (self._reserved == 0 or version != self.version):
                self._cache._discard(self._name)
                self._reserved = 0
                self._reserve(version, version.size or 0, wait=self._wait)
            self.version, self.position = version, offset
            self._file = open(self._cache._path(self._name, _PARTIAL), "r+b", buffering=0)  # noqa: SIM115
            self._file.truncate(offset)
            self._file.seek(offset)

    def write(self, block: bytes) -> None:
        assert self._file is not None
        assert self.version is not None
        end = self.position + len(block)
        with self._cache._local_errors():
            if end > self._reserved:  # of unknown size
                self._reserve(self.version, end, wait=False)
            rest = memoryview(block)
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
                self.position += written

    def finish(self) -> None:
        self.close()
        with self._cache._local_errors():
            self._cache._commit(self._name, self._lock, self.version or Version(), self.position)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reserve(self, version: Version, size: int, *, wait: bool) -> None:
        self._cache._reserve(self._name, self._lock, self._url, version, size, wait=wait)
        self._reserved = size


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


@dataclass(frozen=True)
class _Record:
    """What ``NAME.lock`` holds."""

    version: Version
    reserved: int

    @classmethod
    def read(cls, file: int) -> "_Record":
        """The record; an empty one when a killed process left none or half of one."""
        try:
            values = json.loads(os.pread(file, 2**16, 0))
            return cls(
                Version(size=values["size"], etag=values["etag"], modified=values["modified"]),
                int(values["reserved"]),
            )
        except (ValueError, KeyError, TypeError):
            return cls(Version(), 0)

    def write(self, file: int) -> None:
        values = {
            "size": self.version.size,
            "etag": self.version.etag,
            "modified": self.version.modified,
            "reserved": self.reserved,
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(values).encode(), 0)


def _name_of(url: str) -> str:
    """A file name of its own for every URL, readable at its end."""
    last = re.sub(r"[^\w.-]", "_", shown(url).rpartition("/")[2], flags=re.ASCII)[-80:]
    if last.endswith((_PARTIAL, _LOCK)):
        last += "_"
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{last or 'file'}"


def _locked(path: str) -> int:
    """A descriptor with an exclusive lock; waits for it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
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

"""Copies of remote files in a folder on the local disk, shared by all processes that use it.

A copy appears when it is whole, by a rename. A shared flock on a file, held while it is written or
open, keeps it from being evicted; the kernel releases it when its process ends, however that ends,
so what a killed process left half-written is evicted like an old copy. A lock file per copy lets
one process fetch it while the others wait.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ds_linclip.data.remote.backends import RemoteError
from ds_linclip.data.remote.urls import redact
from ds_linclip.process.atomic import atomic_file, sync

__all__ = ["CacheError", "DiskCache"]

#: A copy, or the temporary file of one that is being written.
_FILE = re.compile(r"(\.?)[0-9a-f]{16}-[\w.-]+", re.ASCII)
_LOCK = ".lock"
_GIB = 2**30
_WAIT = 0.2  # seconds between two attempts to find room
_MAX_WAITS = 10  # while no file is being written: one that has just come is open for a moment


class CacheError(OSError):
    """The cache folder cannot take another copy."""


class DiskCache:
    """A bounded folder of copies, of which the least recently used are evicted.

    The object holds no state but its settings, so processes and threads may each have their own.
    The folder, on a local disk, is created when needed; ``max_gib`` includes what is being written.
    """

    def __init__(self, folder: str, max_gib: float) -> None:
        self._folder = Path(folder)
        self._max_gib = max_gib
        self._max_bytes = int(max_gib * _GIB)

    def check(self) -> None:
        """Create the folder; raise a CacheError naming ``data.cache.dir`` if it is not writable."""
        with self._local_errors(), self._folder_locked():
            pass

    def open(self, url: str) -> BinaryIO | None:
        """Open a whole copy, None if there is none; it is not evicted until it is closed."""
        with self._local_errors(), ExitStack() as until_returned:
            try:
                copy = until_returned.enter_context(open(self._path(url), "rb"))
                fcntl.flock(copy, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):  # the latter: it is being evicted
                return None
            if os.fstat(copy.fileno()).st_nlink == 0:
                return None
            with suppress(PermissionError):  # another user's copy
                os.utime(copy.fileno())
            until_returned.pop_all()
            return copy

    @contextmanager
    def locked(self, url: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the right to fetch a file: one process or thread at a time.

        Raises:
            filelock.Timeout: another one holds it, and ``wait`` is False.
            CacheError: the folder is not writable.
        """
        path = self._path(url, _LOCK)
        with self._local_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire(blocking=wait)
        try:
            yield
        finally:
            # Those who wait for the removed file notice, or at worst fetch a second time.
            path.unlink(missing_ok=True)
            lock.release()

    def store(
        self, url: str, size: int | None, blocks: Iterable[bytes], *, wait: bool = True
    ) -> BinaryIO:
        """Write a copy and open it; call it while holding :meth:`locked`.

        Args:
            url, blocks: The remote file and its content.
            size: Bytes, if they are known beforehand.
            wait: Whether to wait for room while other processes are writing copies.

        Raises:
            CacheError: no room (naming ``data.cache.max_gib``), a full disk, or a folder that is
                not writable (naming ``data.cache.dir``).
        """
        path = self._path(url)
        # The temporary file stays locked until the copy is open.
        with self._local_errors(), ExitStack() as until_open:
            with atomic_file(path) as partial:
                reserved = size or 0
                file = until_open.enter_context(self._reserve(url, partial, reserved, wait=wait))
                for block in blocks:
                    end = file.tell() + len(block)
                    if end > reserved:  # the size was not announced
                        self._reserve(url, partial, end, wait=False).close()
                        reserved = end
                    file.write(block)
                file.flush()
                sync(partial)  # or a copy could be empty after a power cut
                # Another process that counts the files would miss one that is renamed meanwhile.
                until_open.enter_context(self._folder_locked())
            copy = self.open(url)
            if copy is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return copy

    def evict(self, url: str) -> None:
        """Remove a copy; processes that have it open can still read it."""
        with self._local_errors():
            self._path(url).unlink(missing_ok=True)

    def mark_fetched_twice(self, copy: BinaryIO) -> None:
        """Make a copy read-only: it replaced a damaged one and need not be replaced again."""
        with self._local_errors():
            os.fchmod(copy.fileno(), 0o444)

    def was_fetched_twice(self, copy: BinaryIO) -> bool:
        return not os.fstat(copy.fileno()).st_mode & stat.S_IWUSR

    def _reserve(self, url: str, partial: Path, size: int, *, wait: bool) -> BinaryIO:
        """Make room for a temporary file and open it, locked and of its final size, all a hole.

        The size tells other processes how much it will take. A process that waits here has no file
        yet, so two never wait for each other.
        """
        waits = 0
        while True:
            with self._folder_locked():
                in_use, being_written = self._make_room(size, partial)
                if in_use + size <= self._max_bytes:
                    partial.touch()
                    file = open(partial, "r+b")  # noqa: SIM115 - the caller closes it
                    fcntl.flock(file, fcntl.LOCK_SH)
                    file.truncate(size)
                    return file
            waits = 0 if being_written else waits + 1
            if size > self._max_bytes or not wait or waits >= _MAX_WAITS:
                raise CacheError(
                    f"data.cache.max_gib ({self._max_gib}) must be at least what is in use at "
                    f"once: {in_use / _GIB:.3f} GiB are, {redact(url)} has {size / _GIB:.3f} GiB"
                )
            time.sleep(_WAIT)

    def _make_room(self, size: int, partial: Path) -> tuple[int, bool]:
        """Evict the least recently used files until ``size`` more bytes fit.

        Returns:
            The bytes that remain, and whether some of them are still being written.
        """
        files = []
        for path in self._folder.iterdir():
            match = _FILE.fullmatch(path.name)
            if match is None or path == partial or path.suffix == _LOCK:
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, path, status.st_size, bool(match[1])))
        in_use, being_written = sum(file_size for _, _, file_size, _ in files), False
        for _, path, file_size, is_partial in sorted(files):
            if in_use + size <= self._max_bytes:
                break
            if self._evict_unless_open(path):
                in_use -= file_size
            else:
                being_written |= is_partial
        return in_use, being_written

    def _evict_unless_open(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                # Held until the name is gone: who opens it meanwhile sees that.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        return True

    def _path(self, url: str, suffix: str = "") -> Path:
        """Return a path of its own for every URL, readable at its end."""
        name = re.sub(r"[^\w.-]", "_", redact(url).rpartition("/")[2], flags=re.ASCII)[-80:]
        if name.endswith(_LOCK):
            name += "_"
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        return self._folder / f"{digest}-{name or 'file'}{suffix}"

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "shard-cache.lock"):
            yield

    @contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except (CacheError, RemoteError, Timeout):
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

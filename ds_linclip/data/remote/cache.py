"""Local copies of remote files, shared by all threads and processes that use one folder.

A copy that is there is taken as it is: whether the remote file has changed since is not asked.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from ds_linclip.data.remote.backends import RemoteError, Version, shown
from ds_linclip.data.remote.cache_dir import CacheError, CacheFolder, Failure, Record
from ds_linclip.data.remote.download import Sink

__all__ = ["CacheError", "DiskCache"]


class DiskCache:
    """The copies in one folder. Holds no state but the two settings.

    Args:
        folder: On a local disk; made when there is none.
        max_gib: Largest size of all copies together, with those on their way.
    """

    def __init__(self, folder: str, max_gib: float) -> None:
        self._folder = CacheFolder(folder, max_gib)

    def check(self) -> None:
        """Make the folder and try whether it can be written.

        Raises:
            CacheError: naming ``data.cache.dir`` and what is wrong.
        """
        self._folder.make()
        self._folder.check()

    def open(
        self, url: str, fetch: Callable[[Sink], None], *, anew: bool = False, ahead: bool = False
    ) -> BinaryIO:
        """The copy of a file, fetched first when there is none; nobody drops it while it is open.

        Args:
            url: Names the file; equal URLs share a copy.
            fetch: Brings the whole file into the sink it is given, or raises. Those who wait for
                it meanwhile get what it raised.
            anew: Whether to drop the copy that is there, unless that was done before and the same
                content came again.
            ahead: Nobody needs it yet: wait for nothing, neither for another one who fetches it
                (BlockingIOError) nor for room that others may give back, and let those who need
                it try for themselves.

        Raises:
            CacheError: no room (naming ``data.cache.max_gib``), or the folder or its disk is at
                fault (naming ``data.cache.dir``).
        """
        name, folder = _name_of(url), self._folder
        folder.make()
        if not anew:
            with folder.local_errors():
                found = folder.open_copy(name)
            if found is not None:
                return found
        with folder.entry_locked(name, url, wait=not ahead) as lock:
            with folder.local_errors():
                found, record = folder.open_copy(name), Record.read(lock)
                if found is not None:
                    if not anew or record.confirmed:
                        return found
                    found.close()
                doubted = record.version if found is not None or record.confirmed else None
                folder.drop_copy(name)
                if anew:
                    folder.drop_partial(name)
            self._fetch(name, lock, url, fetch, ahead, doubted)
            with folder.local_errors():
                found = folder.open_copy(name)
            if found is None:
                raise CacheError(
                    f"data.cache.dir ({folder.path}) must keep its files: the copy of "
                    f"{shown(url)} is gone at once"
                )
            return found

    def _fetch(
        self,
        name: str,
        lock: int,
        url: str,
        fetch: Callable[[Sink], None],
        ahead: bool,
        doubted: Version | None,
    ) -> None:
        folder = self._folder
        with folder.local_errors():
            partial = _Partial(folder, name, lock, url, wait=not ahead)
        try:
            fetch(partial)
            partial.finish(doubted)
        except OSError as error:
            absent, remote = isinstance(error, FileNotFoundError), isinstance(error, RemoteError)
            with folder.local_errors():
                if absent or (remote and not ahead):
                    failure = Failure(time.time(), absent, error.strerror or str(error))
                    replace(Record.read(lock), failure=failure).write(lock)
                # Bytes of a file that may come yet are gone on with by the next one to ask.
                if not remote or partial.position == 0:
                    folder.drop_traces(name)
            raise
        finally:
            partial.close()


class _Partial:
    """The sink of one entry: its partial file, within what is reserved for it."""

    def __init__(self, folder: CacheFolder, name: str, lock: int, url: str, wait: bool) -> None:
        self.version: Version | None = None
        self.position = 0
        self._folder, self._name, self._lock = folder, name, lock
        self._url, self._wait = url, wait
        self._reserved = 0
        self._file: BinaryIO | None = None
        path, record = folder.partial(name), Record.read(lock)
        if record.version.resumable and os.path.exists(path):
            self.version = record.version
            self.position = os.path.getsize(path)
            self._reserved = record.reserved
        else:
            folder.drop_partial(name)

    def start(self, version: Version, offset: int) -> None:
        with self._folder.local_errors():
            self.close()
            if offset == 0 and (self._reserved == 0 or version != self.version):
                self._folder.drop_partial(self._name)
                self._reserved = 0
                self._reserve(version, version.size or 0, wait=self._wait)
            self.version, self.position = version, offset
            self._file = open(self._folder.partial(self._name), "r+b", buffering=0)  # noqa: SIM115
            self._file.truncate(offset)
            self._file.seek(offset)

    def write(self, block: bytes) -> None:
        assert self._file is not None
        assert self.version is not None
        end = self.position + len(block)
        with self._folder.local_errors():
            if end > self._reserved:  # of unknown size
                self._reserve(self.version, end, wait=False)
            rest = memoryview(block)
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
                self.position += written

    def finish(self, doubted: Version | None) -> None:
        """It is whole; the same content as one that was doubted is what the source has."""
        self.close()
        come = self.version or Version()
        final = Version(size=self.position, etag=come.etag, modified=come.modified)
        with self._folder.local_errors():
            self._folder.commit(self._name, self._lock, final, confirmed=final == doubted)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reserve(self, version: Version, size: int, *, wait: bool) -> None:
        self._folder.reserve(self._name, self._lock, self._url, version, size, wait=wait)
        self._reserved = size


def _name_of(url: str) -> str:
    """A file name of its own for every URL, readable at its end."""
    last = re.sub(r"[^\w.-]", "_", shown(url).rpartition("/")[2], flags=re.ASCII)[-80:]
    if last.endswith((".partial", ".lock")):
        last += "_"
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{last or 'file'}"

"""Files that a user names: local paths, and URLs read through a cache on the local disk."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote.backends import RefusedError, RemoteFiles
from ds_linclip.data.remote.cache import CacheError, DiskCache
from ds_linclip.data.remote.urls import is_remote, local_path, redact

__all__ = ["Storage"]

logger = logging.getLogger(__name__)

_MAX_SIDE_FILE_BYTES = 2**28


class Storage:
    """Opens local paths where they are, and remote files through copies on the local disk.

    It may be pickled, used after a fork and by several threads: every process opens its own
    connections and starts its own threads.
    """

    def __init__(self, cache: CacheConfig, network: NetworkConfig) -> None:
        self._cache_config = cache
        self._network = network
        #: By process; a forked one leaves its parent's alone, see :class:`RemoteFiles`.
        self._processes: dict[int, _Process] = {}

    def __reduce__(self) -> tuple[type["Storage"], tuple[CacheConfig, NetworkConfig]]:
        return Storage, (self._cache_config, self._network)

    def check(self, urls: Sequence[str]) -> None:
        """Check before the first shard is read that copies of remote files can be kept.

        Raises:
            ValueError: naming ``data.cache.dir``: a URL is remote, and the folder is None or not
                writable.
        """
        remote = next(filter(is_remote, urls), None)
        if remote is not None:
            try:
                self._cache(remote).check()
            except CacheError as error:
                raise ValueError(str(error)) from error

    def open(self, url: str, *, refetch: bool = False, ahead: bool = False) -> BinaryIO:
        """Open a whole file on the local disk for ``os.pread``; it stays while it is open.

        A remote file that has no copy is fetched first, by one process while others wait.

        Args:
            url: Path or URL.
            refetch: The copy turned out to be damaged: fetch it once more. A copy that was fetched
                twice is opened as it is: it is damaged at its source.
            ahead: Try once, and wait neither for room nor for a process that fetches it already.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: refused or absent credentials, or every try failed.
            CacheError: no room within ``data.cache.max_gib``, a full disk, a folder that is not
                writable.
            OSError: another error of the local file system.
            ValueError: the file is remote and ``data.cache.dir`` is None.
        """
        if not is_remote(url):
            return open(local_path(url), "rb")
        cache, remote = self._cache(url), self._process().remote
        copy = None if refetch else cache.open(url)
        if copy is not None:
            return copy
        with cache.locked(url, wait=not ahead):
            copy = cache.open(url)
            if copy is not None and (not refetch or cache.was_fetched_twice(copy)):
                return copy
            if copy is not None:
                copy.close()
            cache.evict(url)

            def download() -> BinaryIO:
                with remote.open(url) as source:
                    return cache.store(url, source.size, source.blocks(), wait=not ahead)

            copy = remote.retry(url, download, 1 if ahead else self._network.max_tries)
            if refetch:
                cache.mark_fetched_twice(copy)
            return copy

    def read(
        self, url: str, max_bytes: int = _MAX_SIDE_FILE_BYTES, *, refused_is_absent: bool = False
    ) -> bytes | None:
        """Return the content of a small file, None if it does not exist; the cache is not used.

        Args:
            url, max_bytes: The file and its largest size.
            refused_is_absent: Whether a file counts as absent when the server refuses the
                credentials: some answer so for a file that does not exist or is not signed for.

        Raises:
            ValueError: the file is larger than ``max_bytes``.
            OSError: see :meth:`open`.
        """
        try:
            content = self._start_of(url, max_bytes + 1)
        except FileNotFoundError:
            return None
        except RefusedError:
            if refused_is_absent:
                return None
            raise
        if len(content) > max_bytes:
            raise ValueError(f"{redact(url)} must have at most {max_bytes} bytes")
        return content

    def head(self, url: str) -> bytes:
        """Return the first 512 bytes of a file at its source; errors are those of :meth:`open`."""
        return self._start_of(url, 512)

    def exists(self, url: str) -> bool:
        """Return whether a file exists at its source; errors are those of :meth:`open`."""
        if not is_remote(url):
            return os.path.isfile(local_path(url))
        try:
            self._start_of(url, 0)
        except FileNotFoundError:
            return False
        return True

    def prefetch(self, urls: Sequence[str]) -> None:
        """Start to fetch remote files in the background, ``network.downloads`` at once per process.

        A file that finds no room, or whose first try fails, is skipped: :meth:`open` reports it.
        """
        remote = [url for url in urls if is_remote(url)]
        if remote:
            self._cache(remote[0])
            self._process().prefetch(remote)

    def _start_of(self, url: str, num_bytes: int) -> bytes:
        if is_remote(url):
            return self._process().remote.start_of(url, num_bytes)
        with open(local_path(url), "rb") as file:
            return file.read(num_bytes)

    def _cache(self, url: str) -> DiskCache:
        if self._cache_config.dir is None:
            raise ValueError(
                "data.cache.dir (None) must name a folder on a local disk: data.train has remote "
                f"shards (first: {redact(url)})"
            )
        return DiskCache(self._cache_config.dir, self._cache_config.max_gib)

    def _process(self) -> "_Process":
        process = os.getpid()
        if process not in self._processes:
            fetch = partial(self.open, ahead=True)
            self._processes.setdefault(process, _Process(self._network, fetch))
        return self._processes[process]


class _Process:
    """The connections of one process, and its threads, which end with it as by a kill."""

    def __init__(self, network: NetworkConfig, fetch: Callable[[str], BinaryIO]) -> None:
        self.remote = RemoteFiles(network)
        self._num_threads, self._fetch = network.downloads, fetch
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: set[str] = set()

    def prefetch(self, urls: Sequence[str]) -> None:
        with self._lock:
            for url in urls:
                if url not in self._waiting:
                    self._waiting.add(url)
                    self._queue.put(url)
            while len(self._threads) < min(self._num_threads, len(self._waiting)):
                thread = threading.Thread(target=self._work, daemon=True, name="shard-prefetch")
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            url = self._queue.get()
            try:
                self._fetch(url).close()
            except OSError:
                pass  # reported when the file is opened
            except Exception as error:  # noqa: BLE001 - nobody would notice that a thread ended
                logger.warning("%s is not prefetched: %s", redact(url), type(error).__name__)
            finally:
                with self._lock:
                    self._waiting.discard(url)

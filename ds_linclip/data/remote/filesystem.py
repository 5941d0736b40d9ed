"""Where the files that a user names lie: local paths, and URLs behind a cache on the local disk."""

import difflib
import errno
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO

import fsspec

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote.backends import RemoteError, shown
from ds_linclip.data.remote.cache import CacheError, DiskCache
from ds_linclip.data.remote.download import Remote

__all__ = ["CacheError", "RemoteError", "Storage", "check_url", "is_remote", "shown"]

logger = logging.getLogger(__name__)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
#: What fsspec knows that is no store of its own: wrappers, archives, and what lives in a process.
_NOT_STORES = {
    "async_wrapper",
    "asynclocal",
    "asyncwrapper",
    "blockcache",
    "cached",
    "data",
    "dir",
    "filecache",
    "generic",
    "libarchive",
    "memory",
    "pyscript",
    "reference",
    "simplecache",
    "tar",
    "zip",
}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_MAX_SIDE_FILE_BYTES = 2**28


class Storage:
    """Where files named by the user lie: local paths, or URLs of fsspec through a disk cache.

    May be pickled, and used after a fork and by several threads: transfers and their threads are
    made anew by every process that needs them.

    Args:
        cache: Where copies of remote files go, and how many.
        network: Timeouts, tries and parallel transfers.
    """

    def __init__(self, cache: CacheConfig, network: NetworkConfig) -> None:
        self._cache = cache
        self._network = network
        self._copies = None if cache.dir is None else DiskCache(cache.dir, cache.max_gib)
        # By process; a forked one leaves its parent's alone, see HttpStore in stores.py.
        self._processes: dict[int, _Process] = {}

    def __reduce__(self) -> tuple[type["Storage"], tuple[CacheConfig, NetworkConfig]]:
        return Storage, (self._cache, self._network)

    def check(self, urls: Sequence[str]) -> None:
        """Find out before the first shard whether copies can be kept.

        Raises:
            ValueError: naming ``data.cache.dir``: some URL is remote, and it is None or cannot be
                written.
        """
        remote = next(filter(is_remote, urls), None)
        if remote is not None:
            try:
                self._disk_cache(remote).check()
            except CacheError as error:
                raise ValueError(str(error)) from error

    def open(self, url: str) -> BinaryIO:
        """A whole local file, open for ``os.pread``; while it is open it is not evicted.

        A remote file is fetched first when there is no copy of it; whoever fetches it, others wait
        for that, and share its failure.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: of a local path, such as PermissionError: the machine is at fault, not the
                data.
            RemoteError: refused or absent credentials, or out of reach after all tries.
            CacheError: no room within ``data.cache.max_gib``, a full disk, a folder that cannot be
                written.
            ValueError: ``data.cache.dir`` is None and the file remote.
        """
        return self._open(url)

    def open_again(self, url: str) -> BinaryIO:
        """As :meth:`open`, after the copy turned out damaged: a remote file is fetched anew.

        Unless that was done before, and the same content came again: it is so at its source.
        """
        return self._open(url, anew=True)

    def read(
        self,
        url: str,
        max_bytes: int = _MAX_SIDE_FILE_BYTES,
        *,
        refused_is_absent: bool = False,
    ) -> bytes | None:
        """A small file in memory, without the cache; None when there is none.

        Args:
            url: Names the file.
            max_bytes: Its largest size.
            refused_is_absent: Whether it counts as none when a store refuses the credentials: so
                answer some for a file that does not exist, or was not signed for.

        Raises:
            ValueError: it has more than ``max_bytes``.
            OSError: as :meth:`open`.
        """
        if is_remote(url):
            remote = self._process().remote
            return remote.read(url, max_bytes, refused_is_absent=refused_is_absent)
        try:
            with open(_local_path(url), "rb") as file:
                content = file.read(max_bytes + 1)
        except FileNotFoundError:
            return None
        if len(content) > max_bytes:
            raise ValueError(f"{url} must have at most {max_bytes} bytes")
        return content

    def exists(self, url: str) -> bool:
        """Whether there is such a file, asked of where it lies, not of the cache.

        Raises:
            RemoteError: as :meth:`open`.
        """
        if is_remote(url):
            return self._process().remote.exists(url)
        return os.path.isfile(_local_path(url))

    def head(self, url: str) -> bytes:
        """The first bytes of a file, 512 at least where it has them, from where it lies.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: as :meth:`open`.
        """
        if not is_remote(url):
            with open(_local_path(url), "rb") as file:
                return file.read(512)
        found = self._process().remote.head(url)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(url))
        return found

    def prefetch(self, urls: Sequence[str]) -> None:
        """Start fetching remote files in the background, ``network.downloads`` at once per process.

        A file for which there is no room, or that does not come at the first try, is passed over:
        :meth:`open` meets the error again.
        """
        remote = [url for url in urls if is_remote(url)]
        if remote:
            self._disk_cache(remote[0])
            self._process().prefetch(remote, partial(self._open, ahead=True))

    def _open(self, url: str, *, anew: bool = False, ahead: bool = False) -> BinaryIO:
        if not is_remote(url):
            return open(_local_path(url), "rb")
        fetch = partial(self._process().remote.fetch, url, ahead=ahead)
        return self._disk_cache(url).open(url, fetch, anew=anew, ahead=ahead)

    def _disk_cache(self, url: str) -> DiskCache:
        if self._copies is None:
            raise ValueError(
                "data.cache.dir (None) must name a folder on a local disk: data.train has remote "
                f"shards (first: {shown(url)})"
            )
        return self._copies

    def _process(self) -> "_Process":
        process = os.getpid()
        if process not in self._processes:
            self._processes.setdefault(process, _Process(self._network))
        return self._processes[process]


def is_remote(url: str) -> bool:
    """Whether it is a URL of something else than a local file."""
    match = _SCHEME.match(url)
    return match is not None and match[1].lower() not in _LOCAL


def check_url(url: str) -> None:
    """Refuse what is neither a local path nor a URL of a store that can be read here.

    Raises:
        ValueError: naming ``data.train``: a command, a chain of file systems, a scheme that fsspec
            does not know, or one whose package is not installed.
    """
    name = f"data.train ({shown(url)})"
    if url.startswith("pipe:"):
        raise ValueError(f"{name} must be a path or a URL: commands are not run")
    if re.match(r"\w+::", url) or re.search(r"::\w[\w+.-]*://", url):
        raise ValueError(f"{name} must be a single URL, not a chain of file systems (::)")
    if not is_remote(url):
        return
    match = _SCHEME.match(url)
    assert match is not None
    scheme = match[1].lower()
    accepted = [known for known in fsspec.available_protocols() if known not in _NOT_STORES]
    if scheme not in accepted:
        near = difflib.get_close_matches(scheme, accepted, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(f'{each}://' for each in near)}?" if near else ""
        raise ValueError(
            f"{name} must be a local path or have a scheme that fsspec knows, such as https, s3, "
            f"gs, az, hdfs or hf{hint}"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        what = f"pip install 'ds_linclip[{extra}]'" if extra else str(error)
        raise ValueError(
            f"{name} needs a package that is not installed for {scheme}://: {what}"
        ) from error


def _local_path(url: str) -> str:
    match = _SCHEME.match(url)
    return url[match.end() :] if match is not None else url


class _Process:
    """What one process has open to remote stores, and its threads."""

    def __init__(self, network: NetworkConfig) -> None:
        self.remote = Remote(network)
        self._num_threads = network.downloads
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._queue: queue.SimpleQueue[tuple[str, Callable[[str], BinaryIO]]] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._reported: set[type[Exception]] = set()

    def prefetch(self, urls: Sequence[str], fetch: Callable[[str], BinaryIO]) -> None:
        with self._lock:
            for url in urls:
                if url not in self._waiting:
                    self._waiting.add(url)
                    self._queue.put((url, fetch))
            while len(self._threads) < min(self._num_threads, len(self._waiting)):
                # Daemons: the end of the process ends transfers, as a kill would.
                thread = threading.Thread(target=self._work, daemon=True, name="shard-prefetch")
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            url, fetch = self._queue.get()
            try:
                fetch(url).close()
            except OSError:
                pass  # open() meets it again, in a place that can report it
            except Exception as error:  # noqa: BLE001 - a thread that ended would be missed by none
                if type(error) not in self._reported:
                    self._reported.add(type(error))
                    logger.warning("%s is not fetched ahead: %s", shown(url), type(error).__name__)
            finally:
                with self._lock:
                    self._waiting.discard(url)

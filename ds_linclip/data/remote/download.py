"""Transfers of remote files: tries with growing pauses, broken bodies gone on with.

A transfer counts as alive as long as any byte comes within ``read_timeout``: a server that sends
one byte now and then is waited for.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ds_linclip.config import NetworkConfig
from ds_linclip.data.remote.backends import (
    Body,
    BrokenOff,
    FileSystemStore,
    HttpStore,
    RefusedError,
    RemoteError,
    Version,
    shown,
)

__all__ = ["Remote", "Sink"]

logger = logging.getLogger(__name__)

_SAME_STORE = {"s3a": "s3", "gcs": "gs"}


class Sink(Protocol):
    """Where the bytes of a transfer go; it outlives the tries."""

    @property
    def position(self) -> int:
        """Bytes it holds."""

    @property
    def version(self) -> Version | None:
        """Content that they belong to."""

    def start(self, version: Version, offset: int) -> None:
        """Bytes of this content follow from ``offset`` (0, or the position); drop what is there."""

    def write(self, block: bytes) -> None: ...


class Remote:
    """Fetches remote files; belongs to one process, any of its threads may use it."""

    def __init__(self, network: NetworkConfig) -> None:
        self._network = network
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self._http: HttpStore | None = None
        self._others: dict[str, FileSystemStore] = {}

    def fetch(self, url: str, sink: Sink, *, ahead: bool = False) -> None:
        """Bring a whole file into the sink, however many tries it takes to get on.

        Args:
            url: Names the file.
            sink: Takes its bytes.
            ahead: Give up at the first try that brings nothing: nobody waits for it yet.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: credentials refused or absent, a request that no try will heal, or
                ``network.max_tries`` tries in a row that brought no byte beyond the farthest.
        """
        max_tries = 1 if ahead else self._network.max_tries
        self._persist(url, sink, lambda: self._transfer(url, sink), max_tries)

    def read(self, url: str, max_bytes: int, *, refused_is_absent: bool = False) -> bytes | None:
        """A small file in memory, None when there is none.

        Args:
            url: Names the file.
            max_bytes: Its largest size.
            refused_is_absent: Whether it counts as none when the credentials are refused.

        Raises:
            ValueError: it has more than ``max_bytes``.
            RemoteError: as :meth:`fetch`.
        """
        sink = _Memory(url, max_bytes)
        try:
            self.fetch(url, sink)
        except FileNotFoundError:
            return None
        except RefusedError:
            if refused_is_absent:
                return None
            raise
        return bytes(sink.content)

    def exists(self, url: str) -> bool:
        """Whether the store has the file.

        Raises:
            RemoteError: as :meth:`fetch`.
        """

        return self._look(url, lambda body: b"") is not None

    def head(self, url: str) -> bytes | None:
        """The first bytes of a file, as many as come at once; None when there is none.

        Raises:
            RemoteError: as :meth:`fetch`.
        """
        return self._look(url, lambda body: body.read())

    def _look(self, url: str, read: Callable[[Body], bytes]) -> bytes | None:
        found = b""

        def ask() -> None:
            nonlocal found
            body = self._store(url).open(url, None, 0)
            try:
                found = read(body)
            finally:
                body.close()

        try:
            self._persist(url, _Memory(url, 0), ask, self._network.max_tries)
        except FileNotFoundError:
            return None
        return found

    def _persist(self, url: str, sink: Sink, attempt: Callable[[], None], max_tries: int) -> None:
        """Try until it succeeds, fails for good, or does not get on."""
        farthest, fruitless, retries = sink.position, 0, 0
        while True:
            try:
                attempt()
                return
            except BrokenOff as error:
                progress = sink.position > farthest
                farthest = max(farthest, sink.position)
                fruitless, retries = 0 if progress else fruitless + 1, retries + 1
                if fruitless >= max_tries:
                    raise RemoteError(
                        f"{shown(url)} cannot be fetched: {fruitless} tries brought no progress, "
                        f"the last: {error}"
                    ) from None
                pause = self._pause(fruitless, error.retry_after)
                # The 1st, 2nd, 4th, 8th, ... of a transfer: a link that keeps breaking is no flood.
                level = logging.WARNING if retries & (retries - 1) == 0 else logging.DEBUG
                logger.log(
                    level,
                    "%s: %s; %d bytes so far, retry %d (%d of %d without progress) in %.1f s",
                    shown(url),
                    error,
                    sink.position,
                    retries,
                    fruitless,
                    max_tries,
                    pause,
                )
                time.sleep(pause)

    def _pause(self, fruitless: int, retry_after: float) -> float:
        longest = self._network.max_backoff
        # An int power that would be huge is cut before it is a float.
        bound = min(longest, self._network.backoff * 2 ** min(max(fruitless - 1, 0), 64))
        return min(longest, max(self._jitter.uniform(0, bound), retry_after))

    def _transfer(self, url: str, sink: Sink) -> None:
        """One try."""
        version = sink.version
        if version is not None and version.size is not None and sink.position == version.size:
            return  # ended between the last byte and the end of the transfer
        body = self._store(url).open(url, version, sink.position)
        try:
            sink.start(body.version, body.offset)
            while block := body.read():
                sink.write(block)
        finally:
            body.close()
        if body.version.size is not None and sink.position != body.version.size:
            raise BrokenOff(f"{sink.position} bytes came, {body.version.size} were announced")

    def _store(self, url: str) -> HttpStore | FileSystemStore:
        scheme = url.partition("://")[0].lower()
        with self._lock:
            if scheme in ("http", "https"):
                self._http = self._http or HttpStore(self._network)
                return self._http
            scheme = _SAME_STORE.get(scheme, scheme)
            if scheme not in self._others:
                self._others[scheme] = FileSystemStore(scheme, self._network)
            return self._others[scheme]


class _Memory:
    """A sink for small files."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self.version: Version | None = None
        self.content = bytearray()
        self._url = url
        self._max_bytes = max_bytes

    @property
    def position(self) -> int:
        return len(self.content)

    def start(self, version: Version, offset: int) -> None:
        self._check(version.size or 0)
        self.version = version
        del self.content[offset:]

    def write(self, block: bytes) -> None:
        self._check(len(self.content) + len(block))
        self.content += block

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ValueError(f"{shown(self._url)} must have at most {self._max_bytes} bytes")

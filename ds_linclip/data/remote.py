"""Transfers of remote files: timeouts, tries with growing pauses, broken bodies gone on with.

HTTP bodies are streamed over fsspec's session; what other stores hold is read in blocks through
their fsspec file system. A transfer counts as alive as long as any byte comes within
``read_timeout``: a server that sends one byte now and then is waited for.
"""

import errno
import importlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from ds_linclip.config import NetworkConfig

__all__ = ["Remote", "RemoteError", "Sink", "Version", "shown"]

logger = logging.getLogger(__name__)

_HTTP_BLOCK = 2**20  # bytes read at once
_FILE_BLOCK = 2**22  # the file system reads another one ahead: a request per 8 MiB

_REFUSED = {401, 403, 407}
#: Of the statuses that blame the request, those that another try may heal.
_PASSING = {408, 409, 412, 416, 425, 429}
#: What the packages behind fsspec raise that is no OSError, by scheme.
_ERRORS = {
    "s3": {
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "botocore.parsers": ("ResponseParserError",),
    },
    "gs": {
        "gcsfs.retry": ("ChecksumError", "HttpError"),
        "google.auth.exceptions": ("GoogleAuthError",),
    },
}
_SAME_STORE = {"s3a": "s3", "gcs": "gs"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_WRONG_REQUEST = {"ParamValidationError", "UnknownEndpointError", "ProfileNotFound"}


class RemoteError(OSError):
    """A remote file cannot be had, though nothing says that it does not exist."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """What tells one content of a remote file from another.

    Attributes:
        size: In bytes, if announced.
        etag: As the store names it.
        modified: Time of the last change, as the store writes it.
    """

    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether bytes of it can be told from those of a later content."""
        return self.size is not None and (self.etag or self.modified) is not None

    def agrees(self, other: "Version") -> bool:
        """Nothing that both tell differs."""
        pairs = (
            (self.size, other.size),
            (self.etag, other.etag),
            (self.modified, other.modified),
        )
        return all(mine == theirs for mine, theirs in pairs if None not in (mine, theirs))


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
        self._http: _HttpStore | None = None
        self._others: dict[str, _FileSystemStore] = {}

    def fetch(self, url: str, sink: Sink) -> None:
        """Bring a whole file into the sink, however many tries it takes to get on.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: credentials refused or absent, a request that no try will heal, or
                ``network.max_tries`` tries in a row that brought no byte beyond the farthest.
        """
        self._persist(url, sink, lambda: self._transfer(url, sink))

    def read(self, url: str, max_bytes: int) -> bytes | None:
        """A small file in memory, None when there is none.

        Raises:
            ValueError: it has more than ``max_bytes``.
            RemoteError: as :meth:`fetch`.
        """
        sink = _Memory(url, max_bytes)
        try:
            self.fetch(url, sink)
        except FileNotFoundError:
            return None
        return bytes(sink.content)

    def exists(self, url: str) -> bool:
        """Whether the store has the file.

        Raises:
            RemoteError: as :meth:`fetch`.
        """

        def ask() -> None:
            store = self._store(url)
            with store.errors(url):
                store.open(url, None, 0).close()

        try:
            self._persist(url, _Memory(url, 0), ask)
        except FileNotFoundError:
            return False
        return True

    def _persist(self, url: str, sink: Sink, attempt: Callable[[], None]) -> None:
        """Try until it succeeds, fails for good, or does not get on."""
        farthest, fruitless, retries = sink.position, 0, 0
        while True:
            try:
                attempt()
                return
            except _BrokenOff as error:
                progress = sink.position > farthest
                farthest = max(farthest, sink.position)
                fruitless, retries = 0 if progress else fruitless + 1, retries + 1
                if fruitless >= self._network.max_tries:
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
                    self._network.max_tries,
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
        store = self._store(url)
        with store.errors(url):
            body = store.open(url, version, sink.position)
        try:
            sink.start(body.version, body.offset)
            while True:
                with store.errors(url):
                    block = body.read()
                if not block:
                    break
                sink.write(block)
        finally:
            body.close()
        if body.version.size is not None and sink.position != body.version.size:
            raise _BrokenOff(f"{sink.position} bytes came, {body.version.size} were announced")

    def _store(self, url: str) -> "_HttpStore | _FileSystemStore":
        scheme = url.partition("://")[0].lower()
        with self._lock:
            if scheme in ("http", "https"):
                self._http = self._http or _HttpStore(self._network)
                return self._http
            scheme = _SAME_STORE.get(scheme, scheme)
            if scheme not in self._others:
                self._others[scheme] = _FileSystemStore(scheme, self._network)
            return self._others[scheme]


def shown(url: str) -> str:
    """The URL without what may be secret: user and password, query, fragment."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url).partition("?")[0].partition("#")[0]


class _BrokenOff(Exception):
    """A try failed; another may not."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _HttpStatus(OSError):
    """An answer without a body of ours."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.retry_after = float(retry_after) if (retry_after or "").isdigit() else 0.0  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Body:
    version: Version
    offset: int
    read: Callable[[], bytes]
    close: Callable[[], None]


class _HttpStore:
    """HTTP and HTTPS, streamed; proxies are those of the environment, redirects are followed."""

    def __init__(self, network: NetworkConfig) -> None:
        timeout = aiohttp.ClientTimeout(
            connect=network.connect_timeout,
            sock_connect=network.connect_timeout,
            sock_read=network.read_timeout,
        )
        client = {"timeout": timeout, "trust_env": True}
        # Not in fsspec's own cache of instances: a forked process empties that, and closing the
        # parent's connections there takes them out of the parent's event loop too.
        self._filesystem = fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True)

    @contextmanager
    def errors(self, url: str) -> Iterator[None]:
        try:
            yield
        except (OSError, aiohttp.ClientError) as error:
            raise _judge(error, url) from None

    def open(self, url: str, have: Version | None, position: int) -> _Body:
        """The body from ``position`` on if what ``have`` tells still holds, else from 0 on."""
        headers = {"Accept-Encoding": "identity"}
        if have is not None and have.resumable and position > 0:
            wanted = {"Range": f"bytes={position}-"}
            # Weak tags do not promise the same bytes.
            strong = have.etag if have.etag and not have.etag.startswith("W/") else None
            if strong or have.modified:
                wanted["If-Range"] = strong or have.modified or ""
            response = self._get(url, headers | wanted, (200, 206, 416))
            if response.status == 200:
                return self._body(response, _version(response), 0)
            start, size = _content_range(response)
            version = _version(response, size)
            if response.status == 206 and start == position and have.agrees(version):
                return self._body(response, have, position)
            self._release(response)
        response = self._get(url, headers, (200,))
        return self._body(response, _version(response), 0)

    def _get(
        self, url: str, headers: dict[str, str], accepted: tuple[int, ...]
    ) -> aiohttp.ClientResponse:
        async def get() -> aiohttp.ClientResponse:
            session = await self._filesystem.set_session()
            answer = await session.get(self._filesystem.encode_url(url), headers=headers)
            assert isinstance(answer, aiohttp.ClientResponse)
            return answer

        response: aiohttp.ClientResponse = sync(self._filesystem.loop, get)
        if response.status not in accepted:
            self._release(response)
            raise _HttpStatus(response.status, response.headers.get("Retry-After"))
        return response

    def _body(self, response: aiohttp.ClientResponse, version: Version, offset: int) -> _Body:
        async def take() -> bytes:
            block = bytearray()
            while len(block) < _HTTP_BLOCK:
                try:
                    piece = await response.content.read(_HTTP_BLOCK - len(block))
                except (OSError, aiohttp.ClientError):
                    if not block:
                        raise
                    break  # what came before counts; the next call raises it again
                if not piece:
                    break
                block += piece
            return bytes(block)

        def read() -> bytes:
            block = sync(self._filesystem.loop, take)
            assert isinstance(block, bytes)
            return block

        return _Body(version, offset, read, lambda: self._release(response))

    def _release(self, response: aiohttp.ClientResponse) -> None:
        """Keep the connection if the body has come to its end, else close it."""
        self._filesystem.loop.call_soon_threadsafe(response.release)


class _FileSystemStore:
    """What fsspec has a file system for, read in blocks."""

    def __init__(self, scheme: str, network: NetworkConfig) -> None:
        self._options = _options(scheme, network)
        self._kinds: tuple[type[Exception], ...] = (OSError, aiohttp.ClientError)
        for module, names in _ERRORS.get(scheme, {}).items():
            self._kinds += tuple(getattr(importlib.import_module(module), name) for name in names)
        self._held: dict[int, Any] = {}

    @contextmanager
    def errors(self, url: str) -> Iterator[None]:
        try:
            yield
        except self._kinds as error:
            raise _judge(error, url) from None
        except IndexError as error:  # s3fs reads the message of a time-out, which has none
            if not isinstance(error.__context__, TimeoutError):
                raise
            raise _judge(error.__context__, url) from None

    def open(self, url: str, have: Version | None, position: int) -> _Body:
        """The body from ``position`` on if what ``have`` tells still holds, else from 0 on."""
        filesystem, path = url_to_fs(url, **self._options)
        self._held[id(filesystem)] = filesystem  # in a forked process too; see _HttpStore
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1  # the pauses between tries are ours
        filesystem.invalidate_cache()
        file = filesystem.open(path, "rb", block_size=_FILE_BLOCK)
        facts = getattr(file, "details", None) or filesystem.info(path)
        if facts.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, "a folder", path)
        version = Version(
            size=facts.get("size"),
            etag=_first(facts, "ETag", "etag"),
            modified=_first(facts, "LastModified", "last_modified", "mtime", "modified"),
        )
        same = have is not None and have.resumable and have == version
        offset = position if same else 0
        file.seek(offset)
        return _Body(version, offset, lambda: file.read(_FILE_BLOCK), file.close)


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


def _options(scheme: str, network: NetworkConfig) -> dict[str, Any]:
    """Timeouts in the words of each file system; others have none, or their own."""
    if scheme == "s3":
        config = {
            "connect_timeout": network.connect_timeout,
            "read_timeout": network.read_timeout,
            "retries": {"total_max_attempts": 1},
        }
        return {"config_kwargs": config, "use_listings_cache": False}
    if scheme == "gs":
        timeout = aiohttp.ClientTimeout(
            connect=network.connect_timeout, sock_read=network.read_timeout
        )
        return {"requests_timeout": timeout}
    return {}


def _judge(error: Exception, url: str) -> Exception:
    """What a failed try means: no such file, no use in trying, or another try."""
    name, status = type(error).__name__, _status(error)
    if isinstance(error, (FileNotFoundError, IsADirectoryError)) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "no such remote file", shown(url))
    if isinstance(error, PermissionError) or status in _REFUSED or name in _NO_CREDENTIALS:
        return RemoteError(
            f"{shown(url)}: credentials are absent or refused ({_reason(error)}); stores that "
            "do not let them list also answer so for a file that does not exist"
        )
    if str(error).startswith("Forbidden"):  # gcsfs
        return RemoteError(f"{shown(url)}: credentials are refused ({_reason(error)})")
    passing = status is None or status >= 500 or status in _PASSING
    final = isinstance(
        error,
        (
            aiohttp.InvalidURL,
            aiohttp.TooManyRedirects,
            aiohttp.ClientConnectorCertificateError,
        ),
    )
    if final or name in _WRONG_REQUEST or not (passing or isinstance(error, TimeoutError)):
        return RemoteError(f"{shown(url)} cannot be fetched: {_reason(error)}")
    return _BrokenOff(_reason(error), getattr(error, "retry_after", 0.0))


def _status(error: Exception) -> int | None:
    """HTTP status behind an error, where the library tells it."""
    if isinstance(error, _HttpStatus):
        return error.status
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):  # botocore
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if isinstance(error, aiohttp.ClientError):
        return None  # an answer that is no HTTP has status 400 here
    code = getattr(error, "code", None)  # gcsfs
    return int(code) if isinstance(code, (int, str)) and str(code).isdigit() else None


def _reason(error: Exception) -> str:
    if isinstance(error, _HttpStatus):
        return str(error)
    if isinstance(error, TimeoutError) and not str(error):
        return "no byte within read_timeout"
    text = re.sub(r"\w+://[^\s'\"]+", lambda match: shown(match[0]), str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _version(response: aiohttp.ClientResponse, size: int | None = None) -> Version:
    length = response.headers.get("Content-Length", "")
    if size is None and response.status == 200 and length.isdigit():
        size = int(length)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return Version()  # compressed on the way: neither the size nor an offset means the file's
    return Version(
        size=size,
        etag=response.headers.get("ETag"),
        modified=response.headers.get("Last-Modified"),
    )


def _content_range(response: aiohttp.ClientResponse) -> tuple[int | None, int | None]:
    """First byte and size of the whole file."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None:
        return None, None
    return int(found[1]), int(found[2]) if found[2] != "*" else None


def _first(facts: dict[str, Any], *names: str) -> str | None:
    return next((str(facts[name]) for name in names if facts.get(name)), None)

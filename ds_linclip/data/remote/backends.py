"""How bytes come out of a store: HTTP, or what fsspec has a file system for; one try at a time.

HTTP bodies are streamed over fsspec's session; what other stores hold is read in blocks through
their fsspec file system. Whatever their libraries raise comes out as one of three: no such file, no
use in trying again, or a try that broke off.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from ds_linclip.config import NetworkConfig

__all__ = [
    "Body",
    "BrokenOff",
    "FileSystemStore",
    "HttpStore",
    "RefusedError",
    "RemoteError",
    "Version",
    "shown",
]

_HTTP_BLOCK = 2**20  # bytes read at once
_FILE_BLOCK = 2**22  # the file system reads another one ahead: a request per 8 MiB

_REFUSED = {401, 403}
#: Of the statuses that blame the request, those that another try may heal.
_PASSING = {408, 409, 412, 416, 425, 429}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_WRONG_REQUEST = {
    "ParamValidationError",
    "UnknownEndpointError",
    "ProfileNotFound",
    "error_perm",  # ftplib: the server says that it is final
}


class RemoteError(OSError):
    """A remote file cannot be had, though nothing says that it does not exist."""


class RefusedError(RemoteError):
    """The store refuses this file to these credentials; some answer so for absent files."""


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


def shown(url: str) -> str:
    """The URL without what may be secret: user and password, query, fragment; paths as they are,
    but for bytes that no encoding knows."""
    url = url.encode(errors="backslashreplace").decode()
    if "://" not in url:
        return url
    return re.sub(r"(?<=://)[^/?#]*@", "", url).partition("?")[0].partition("#")[0]


class BrokenOff(Exception):
    """A try failed; another may not."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _HttpStatus(OSError):
    """An answer without a body of ours."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        seconds = retry_after or ""  # or a date, which is not heeded
        self.retry_after = float(seconds) if seconds.isdecimal() else 0.0


@dataclass(frozen=True)
class Body:
    version: Version
    offset: int
    read: Callable[[], bytes]
    close: Callable[[], None]


class HttpStore:
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

    def open(self, url: str, have: Version | None, position: int) -> Body:
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
                return self._body(url, response, _version(response), 0)
            start, size = _content_range(response)
            version = _version(response, size)
            if response.status == 206 and start == position and have.agrees(version):
                return self._body(url, response, have, position)
            self._release(response)
        response = self._get(url, headers, (200,))
        return self._body(url, response, _version(response), 0)

    def _get(
        self, url: str, headers: dict[str, str], accepted: tuple[int, ...]
    ) -> aiohttp.ClientResponse:
        async def get() -> aiohttp.ClientResponse:
            session = await self._filesystem.set_session()
            answer = await session.get(self._filesystem.encode_url(url), headers=headers)
            assert isinstance(answer, aiohttp.ClientResponse)
            return answer

        with _library_call(url):
            response: aiohttp.ClientResponse = sync(self._filesystem.loop, get)
        if response.status not in accepted:
            self._release(response)
            status = _HttpStatus(response.status, response.headers.get("Retry-After"))
            raise _judge(status, url) from None
        return response

    def _body(
        self, url: str, response: aiohttp.ClientResponse, version: Version, offset: int
    ) -> Body:
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
            with _library_call(url):
                block = sync(self._filesystem.loop, take)
            assert isinstance(block, bytes)
            return block

        return Body(version, offset, read, lambda: self._release(response))

    def _release(self, response: aiohttp.ClientResponse) -> None:
        """Keep the connection if the body has come to its end, else close it."""
        self._filesystem.loop.call_soon_threadsafe(response.release)


class FileSystemStore:
    """What fsspec has a file system for, read in blocks."""

    def __init__(self, scheme: str, network: NetworkConfig) -> None:
        self._options = _options(scheme, network)
        self._kind = fsspec.get_filesystem_class(scheme)
        self._held: dict[int, Any] = {}

    def open(self, url: str, have: Version | None, position: int) -> Body:
        """The body from ``position`` on if what ``have`` tells still holds, else from 0 on."""
        with self._call(url):
            filesystem, path = url_to_fs(url, **self._options)
        if self._kind.async_impl:
            self._held[id(filesystem)] = filesystem  # in a forked process too; see HttpStore
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1  # the pauses between tries are ours
        with self._call(url):
            filesystem.invalidate_cache()
            file = filesystem.open(path, "rb", block_size=_FILE_BLOCK)
            facts = getattr(file, "details", None) or filesystem.info(path)
        if facts.get("type") == "directory":
            raise _absent(url)
        version = Version(
            size=facts.get("size"),
            etag=_first(facts, "ETag", "etag"),
            modified=_first(facts, "LastModified", "last_modified", "mtime", "modified"),
        )
        same = have is not None and have.resumable and have == version
        offset = position if same else 0

        def read() -> bytes:
            with self._call(url):
                block: bytes = file.read(_FILE_BLOCK)
            return block

        def close() -> None:
            # What has been read stays read.
            with suppress(BrokenOff, OSError), self._call(url):
                file.close()

        with self._call(url):
            file.seek(offset)
        return Body(version, offset, read, close)

    @contextmanager
    def _call(self, url: str) -> Iterator[None]:
        try:
            with _library_call(url):
                yield
        except BrokenOff:
            if not self._kind.async_impl:
                # Those keep one connection, and keep it when it is dead.
                self._kind.clear_instance_cache()
            raise


@contextmanager
def _library_call(url: str) -> Iterator[None]:
    """Around calls of fsspec and what is behind it, and nothing of ours."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what those libraries raise has no common base
        raise _judge(error, url) from None


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
        return _absent(url)
    gcs_refuses = str(error).startswith("Forbidden")
    if isinstance(error, PermissionError) or status in _REFUSED or gcs_refuses:
        return RefusedError(_credentials(error, url))
    if status == 407 or name in _NO_CREDENTIALS:
        return RemoteError(_credentials(error, url))
    passing = status is None or status >= 500 or status in _PASSING
    final = isinstance(
        error,
        (
            aiohttp.InvalidURL,
            aiohttp.TooManyRedirects,
            aiohttp.ClientConnectorCertificateError,
            UnicodeError,  # a host that cannot be one
        ),
    )
    if final or name in _WRONG_REQUEST or not (passing or isinstance(error, TimeoutError)):
        return RemoteError(f"{shown(url)} cannot be fetched: {_reason(error)}")
    return BrokenOff(_reason(error), getattr(error, "retry_after", 0.0))


def _absent(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such remote file", shown(url))


def _credentials(error: Exception, url: str) -> str:
    return (
        f"{shown(url)}: credentials are absent or refused ({_reason(error)}); stores that "
        "do not let them list also answer so for a file that does not exist"
    )


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
    code = getattr(error, "status_code", None) or getattr(error, "code", None)  # azure, gcsfs
    return int(code) if isinstance(code, (int, str)) and str(code).isdigit() else None


def _reason(error: Exception) -> str:
    if isinstance(error, _HttpStatus):
        return str(error)
    if isinstance(error, IndexError) and isinstance(error.__context__, TimeoutError):
        error = error.__context__  # s3fs reads the message of a time-out, which has none
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

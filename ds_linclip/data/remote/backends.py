"""Remote files, opened through fsspec for every scheme and retried with growing pauses.

What the libraries behind fsspec raise has no common base class. Here it becomes one of three: the
file does not exist, an error that no retry can fix, or a failure that may pass.
"""

import errno
import ftplib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.core import url_to_fs

from ds_linclip.config import NetworkConfig
from ds_linclip.data.remote.urls import redact, scheme_of

__all__ = ["RefusedError", "RemoteError", "RemoteFiles", "RemoteNotFoundError", "Source"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_HTTP_BUFFER = 2**20  # bytes
_BLOCK = 2**22  # bytes; fsspec reads another one ahead, so a request fetches 8 MiB

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
#: botocore's errors about the request itself; the package need not be installed.
_WRONG_REQUEST = {"ParamValidationError", "UnknownEndpointError", "ProfileNotFound"}
_PERMANENT = (
    aiohttp.InvalidURL,
    aiohttp.TooManyRedirects,
    aiohttp.ClientConnectorCertificateError,
    ftplib.error_perm,
    UnicodeError,  # an impossible host name
)
#: HTTP statuses below 500 that may pass.
_TRANSIENT_STATUSES = {408, 409, 412, 416, 425, 429}


class RemoteError(OSError):
    """A remote file cannot be read."""


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """A remote file does not exist."""


class RefusedError(RemoteError):
    """The server refuses a file to these credentials; some answer so for files that are absent."""


class _TransientError(Exception):
    """An attempt failed; the next one may succeed."""


class Source:
    """An open remote file.

    Attributes:
        size: Bytes, None if the server does not say.
    """

    def __init__(self, url: str, file: Any, size: int | None) -> None:
        self.size = size
        self._url, self._file = url, file

    def blocks(self, max_bytes: int | None = None) -> Iterator[bytes]:
        """Yield the content, the first ``max_bytes`` of it if given, in pieces of up to 4 MiB."""
        position = 0
        while max_bytes is None or position < max_bytes:
            length = _BLOCK if max_bytes is None else min(_BLOCK, max_bytes - position)
            with _translated_errors(self._url):
                block: bytes = self._file.read(length)
            if not block:
                break
            position += len(block)
            yield block
        if self.size is not None and position != self.size and position != max_bytes:
            raise _TransientError(f"{position} bytes came, {self.size} were announced")


class RemoteFiles:
    """Opens remote files for one process; its threads may share it.

    A forked process needs an object of its own, and must keep its parent's: closing the parent's
    connections would also remove them from the parent's event loop.
    """

    def __init__(self, network: NetworkConfig) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._filesystems: dict[str, Any] = {}

    @contextmanager
    def open(self, url: str) -> Iterator[Source]:
        """Open a file for one attempt to read it, to be called within :meth:`retry`."""
        with _translated_errors(url):
            filesystem = self._filesystem(url)
            if scheme_of(url) in ("http", "https"):
                # A stream: one GET. A size, here any, saves a HEAD, which signed URLs refuse.
                file = filesystem.open(url, block_size=0, size=1)
                encoded = file.r.headers.get("Content-Encoding", "identity") != "identity"
                size = None if encoded else file.r.content_length
            else:
                file = filesystem.open(url, block_size=_BLOCK)
                details = getattr(file, "details", None) or filesystem.info(url)
                if details.get("type") == "directory":
                    raise IsADirectoryError
                size = details.get("size")
        try:
            yield Source(url, file, size)
        finally:
            # What has been read stays read.
            with suppress(_TransientError, RemoteError), _translated_errors(url):
                file.close()

    def start_of(self, url: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file, or all if it is shorter; errors as :meth:`retry`."""

        def attempt() -> bytes:
            with self.open(url) as source:
                return b"".join(source.blocks(num_bytes))

        return self.retry(url, attempt, self._network.max_tries)

    def retry(self, url: str, attempt: Callable[[], _Result], max_tries: int) -> _Result:
        """Call ``attempt`` until it succeeds, with pauses that grow exponentially, fully jittered.

        Raises:
            RemoteNotFoundError: at once; the file does not exist.
            RefusedError: at once; the credentials are refused.
            RemoteError: at once if no retry can succeed, else after ``max_tries`` attempts.
        """
        num_tries = 0
        while True:
            try:
                return attempt()
            except _TransientError as error:
                num_tries += 1
                if num_tries >= max_tries:
                    raise RemoteError(
                        f"{redact(url)} cannot be fetched: {num_tries} tries failed, the last: "
                        f"{error}"
                    ) from None
                network = self._network
                longest = min(network.max_backoff, network.backoff * 2.0 ** min(num_tries - 1, 64))
                pause = random.SystemRandom().uniform(0, longest)
                logger.warning(
                    "%s: %s; retry %d of %d in %.1f s",
                    *(redact(url), error, num_tries, max_tries - 1, pause),
                )
                time.sleep(pause)

    def _filesystem(self, url: str) -> Any:
        """Return an fsspec file system that is not in fsspec's own cache, which a fork empties."""
        options = {**self._options(scheme_of(url)), "skip_instance_cache": True}
        if not fsspec.get_filesystem_class(scheme_of(url)).async_impl:
            # These hold one connection, which only one thread may use, and keep it when it is dead.
            return url_to_fs(url, **options)[0]
        server = "/".join(url.split("/")[:3])
        with self._lock:
            if server not in self._filesystems:
                filesystem = url_to_fs(url, **options)[0]
                if scheme_of(url) in ("s3", "s3a"):
                    filesystem.retries = 2  # of a block: resumes a body that was cut
                self._filesystems[server] = filesystem
            return self._filesystems[server]

    def _options(self, scheme: str) -> dict[str, Any]:
        """Return the time-outs as each file system names them."""
        connect, read = self._network.connect_timeout, self._network.read_timeout
        timeout = aiohttp.ClientTimeout(connect=connect, sock_connect=connect, sock_read=read)
        if scheme in ("http", "https"):
            client = {
                "timeout": timeout,
                "trust_env": True,  # proxies
                "raise_for_status": True,  # or fsspec leaves the connection of an error open
                "read_bufsize": _HTTP_BUFFER,
                "headers": {"Accept-Encoding": "identity"},
            }
            return {"client_kwargs": client}
        if scheme in ("s3", "s3a"):
            once = {"total_max_attempts": 1}
            config = {"connect_timeout": connect, "read_timeout": read, "retries": once}
            return {"config_kwargs": config, "use_listings_cache": False}
        if scheme in ("gs", "gcs"):
            return {"requests_timeout": timeout}
        return {}


@contextmanager
def _translated_errors(url: str) -> Iterator[None]:
    """Translate errors of fsspec and the libraries behind it; contains no code of ours."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what those libraries raise has no common base
        raise _translated(error, url) from None


def _translated(error: Exception, url: str) -> Exception:
    name, status, reason = type(error).__name__, _status(error), _reason(error)
    if isinstance(error, (FileNotFoundError, IsADirectoryError)) or status in (404, 410):
        what = "no such remote file"
        if scheme_of(url) == "hf":  # the Hub answers for private files as if they did not exist
            what += ", or one that needs a token with access to it in HF_TOKEN"
        return RemoteNotFoundError(errno.ENOENT, what, redact(url))
    forbidden = str(error).startswith("Forbidden")  # gcsfs
    if isinstance(error, PermissionError) or status in (401, 403) or forbidden:
        return RefusedError(_credentials(url, reason))
    if status == 407 or name in _NO_CREDENTIALS:
        return RemoteError(_credentials(url, reason))
    rejected = status is not None and 300 <= status < 500 and status not in _TRANSIENT_STATUSES
    rejected = rejected and not isinstance(error, TimeoutError)
    if rejected or isinstance(error, _PERMANENT) or name in _WRONG_REQUEST:
        return RemoteError(f"{redact(url)} cannot be fetched: {reason}")
    return _TransientError(reason)


def _credentials(url: str, reason: str) -> str:
    return (
        f"{redact(url)}: credentials are absent or refused ({reason}); servers that do not allow "
        "listing also answer so for a file that does not exist"
    )


def _status(error: Exception) -> int | None:
    """Return the HTTP status behind an error where its library tells it."""
    if isinstance(error, aiohttp.ClientResponseError):
        # An answer that is not HTTP gets status 400 and has a cause.
        return error.status if error.__cause__ is None else None
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):  # botocore
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    code = getattr(error, "status_code", None) or getattr(error, "code", None)  # azure, gcsfs
    return int(code) if isinstance(code, (int, str)) and str(code).isdigit() else None


def _reason(error: BaseException) -> str:
    """Return an error as one line without secrets."""
    if isinstance(error, aiohttp.ClientResponseError) and error.__cause__ is None:
        return f"HTTP status {error.status}"
    if isinstance(error, IndexError) and isinstance(error.__context__, TimeoutError):
        error = error.__context__  # s3fs reads the first argument of a time-out, which has none
    if isinstance(error, TimeoutError) and not str(error):
        error = error.__cause__ or TimeoutError("no byte within read_timeout")
    text = re.sub(r"\w+://[^\s'\"]+", lambda match: redact(match[0]), str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""URLs of shards: which can be read, and how messages show them without their secrets."""

import difflib
import re

import fsspec

__all__ = ["check_url", "is_remote", "local_path", "redact", "scheme_of"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_SCHEMES = ("file", "local")
#: Protocols of fsspec that do not name a place: wrappers, archives, and what lives in a process.
_NOT_REMOTE = {
    *("async_wrapper", "asynclocal", "asyncwrapper", "generic", "reference"),
    *("blockcache", "cached", "filecache", "simplecache"),
    *("dir", "libarchive", "tar", "zip"),
    *("data", "memory", "pyscript"),
}
#: Our optional dependencies by scheme.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def scheme_of(url: str) -> str:
    """Return the scheme in lower case, an empty string for a plain path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match is not None else ""


def is_remote(url: str) -> bool:
    """Return whether a string is a URL of something else than a local file."""
    return scheme_of(url) not in ("", *_LOCAL_SCHEMES)


def local_path(url: str) -> str:
    """Return a path without its ``file://``."""
    return _SCHEME.sub("", url, count=1) if scheme_of(url) else url


def redact(url: str) -> str:
    """Return a URL without what may be secret: user and password, query, fragment.

    Paths stay as they are, except for bytes that cannot be encoded.
    """
    url = url.encode(errors="backslashreplace").decode()
    if "://" not in url:
        return url
    return re.sub(r"(?<=://)[^/?#]*@", "", url).partition("?")[0].partition("#")[0]


def check_url(url: str) -> None:
    """Refuse what is neither a local path nor a URL that can be read.

    Raises:
        ValueError: naming ``data.train``: a command, a chain of file systems, a scheme that fsspec
            does not know, or one whose package is not installed.
    """
    name = f"data.train ({redact(url)})"
    if url.startswith("pipe:"):
        raise ValueError(f"{name} must be a path or a URL: commands are not run")
    if re.match(r"\w+::", url) or re.search(r"::\w[\w+.-]*://", url):
        raise ValueError(f"{name} must be a single URL, not a chain of file systems (::)")
    if not is_remote(url):
        return
    scheme = scheme_of(url)
    accepted = [known for known in fsspec.available_protocols() if known not in _NOT_REMOTE]
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
        remedy = f"pip install 'ds_linclip[{extra}]'" if extra else str(error)
        raise ValueError(
            f"{name} needs a package that is not installed for {scheme}://: {remedy}"
        ) from error

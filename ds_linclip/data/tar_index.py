"""Where each sample of a tar lies: one pass over the headers, then every member is one read."""

import errno
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

__all__ = ["BadSample", "OpenShard", "Role"]

Role = Literal["image", "text", "class", "meta"]

_ROLES: tuple[Role, ...] = ("image", "text", "class", "meta")
_ROLE_OF_EXTENSION: dict[str, int] = {
    extension: _ROLES.index(role)
    for role, extensions in {
        "image": ("jpg", "jpeg", "png", "webp", "gif"),
        "text": ("txt",),
        "class": ("cls",),
        "meta": ("json",),
    }.items()
    for extension in extensions
}

_BLOCK = 512
_MAX_MEMBER_BYTES = 2**50  # headers can name negative sizes and such that no int64 holds


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        cause: Short name under which it is counted.
        whole_shard: The other samples of the shard are bad too.
    """

    def __init__(self, cause: str, *, whole_shard: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.whole_shard = whole_shard


class OpenShard:
    """An open tar and the place of every sample in it.

    A sample is a run of members with one key; the key is the name up to its known extension, so it
    may hold dots. A key that comes twice makes two samples. Members with other extensions are never
    read.

    Args:
        file: A tar on a local file system; from here on it belongs to this object.
        url: What messages call it.

    Attributes:
        keys: Key of each sample.
        repeated_keys: Samples whose key came before.
        cut: The tar is broken or ends before its last member does; what comes before is sound.

    Raises:
        BadSample: ``shard_unreadable``: nothing in it can be read.
        OSError: for what says nothing about the shard: the file system is not answering.
    """

    def __init__(self, file: BinaryIO, url: str) -> None:
        self.url = url
        self.keys: list[str] = []
        self._file = file
        self._end = os.fstat(file.fileno()).st_size
        places: list[list[tuple[int, int]]] = []
        try:
            self.cut = self._scan(places)
        except OSError:
            file.close()
            raise
        if not places and (self.cut or self._end == 0):
            file.close()
            raise BadSample("shard_unreadable", whole_shard=True)
        self._places = np.array(places, dtype=np.int64).reshape(len(places), len(_ROLES), 2)
        self.repeated_keys = len(self.keys) - len(set(self.keys))

    def _scan(self, places: list[list[tuple[int, int]]]) -> bool:
        """Find all samples; returns whether the tar is cut."""
        keys = self.keys
        end = 0
        try:
            for member in _members(self._file):
                end = member.offset + member.size
                key, _, extension = member.name.rpartition(".")
                column = _ROLE_OF_EXTENSION.get(extension.lower())
                if column is None:
                    continue
                if not keys or keys[-1] != key or places[-1][column][0] >= 0:
                    keys.append(key)
                    places.append([(-1, 0)] * len(_ROLES))
                places[-1][column] = (member.offset, member.size)
        except (tarfile.TarError, ValueError, OverflowError):
            return True
        return end > self._end

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, index: int, role: Role, *, max_bytes: int) -> tuple[int, int]:
        """Offset and size in bytes of one member of the sample at ``index``; reads nothing.

        Raises:
            BadSample: ``shard_short`` (no such sample), ``<role>_missing`` or
                ``<role>_too_many_bytes``.
        """
        if index >= len(self.keys):
            raise BadSample("shard_short")
        offset, size = self._places[index, _ROLES.index(role)].tolist()
        if offset < 0:
            raise BadSample(f"{role}_missing")
        if size > max_bytes:
            raise BadSample(f"{role}_too_many_bytes")
        return offset, size

    def read(self, index: int, role: Role, *, max_bytes: int) -> bytes:
        """One member of the sample at ``index``.

        Raises:
            BadSample: as :meth:`find`, or ``<role>_cut``.
        """
        offset, size = self.find(index, role, max_bytes=max_bytes)
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise BadSample(f"{role}_cut")
        return content

    def close(self) -> None:
        self._file.close()


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _members(file: BinaryIO) -> Iterator[_Member]:
    """The regular files in a tar, in order.

    Plain headers, nearly all of them, are read here, five times as fast as tarfile does; from the
    first unusual one on, tarfile reads the rest.

    Raises:
        tarfile.TarError, ValueError, OverflowError: the tar is broken at this place.
    """
    offset = 0
    while header := os.pread(file.fileno(), _BLOCK, offset).rstrip(b"\0"):
        header = header.ljust(_BLOCK, b"\0")
        size = _plain_size(header)
        kind = header[156:157]
        if size is None or kind not in (b"0", b"\0", b"5", b"x"):
            yield from _members_by_tarfile(file, offset)
            return
        if kind == b"x" and not _is_harmless(os.pread(file.fileno(), size, offset + _BLOCK)):
            yield from _members_by_tarfile(file, offset)
            return
        if kind in (b"0", b"\0"):
            yield _Member(_plain_name(header), offset + _BLOCK, size)
        offset += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _members_by_tarfile(file: BinaryIO, offset: int) -> Iterator[_Member]:
    """From the header at ``offset`` on, by the standard library."""
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # or tarfile keeps every header
                if not 0 <= member.size <= _MAX_MEMBER_BYTES:
                    raise tarfile.ReadError(f"size of {member.name} ({member.size}) is no size")
                if member.isreg() and not member.issparse():
                    yield _Member(member.name, member.offset_data, member.size)
            # It takes a broken header for the end, except for the first one.
            if os.pread(file.fileno(), _BLOCK, tar.offset).rstrip(b"\0"):
                raise tarfile.ReadError(f"no header at {tar.offset}")
    except OSError as error:
        if error.errno == errno.EINVAL:  # a broken header points to where no file can reach
            raise tarfile.ReadError(str(error)) from error
        raise


def _plain_size(header: bytes) -> int | None:
    """Size of the member after a sound header of the usual form; None for any other block."""
    try:
        size = int(header[124:136].rstrip(b" \0"), 8)
        checksum = int(header[148:156].rstrip(b" \0"), 8)
    except ValueError:
        return None
    # The sum of all bytes, the checksum's own counted as blanks: Adler-32 holds it (plus 1, modulo
    # 65521), and zlib is quick.
    found = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    return size if size >= 0 and found == (checksum + 1) % 65521 else None


def _plain_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _is_harmless(records: bytes) -> bool:
    """Whether an extended header leaves the next member's name, place and size alone."""
    return not any(
        word in records for word in (b" path=", b" size=", b" GNU.sparse", b" hdrcharset=")
    )

"""Index of the samples in a tar: one pass over the headers, then one read per member.

Faster than tarfile by a factor of 2 to 8, and safe on damaged or hostile files.
"""

import os
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, TypedDict

import numpy as np

__all__ = ["IMAGE_SUFFIXES", "BadSample", "OpenShard", "Role"]

Role = Literal["image", "text", "class", "meta"]

#: Ends of the names of images, in tars and in folders.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_ROLES: tuple[Role, ...] = ("image", "text", "class", "meta")
_ROLE_OF_EXTENSION = {suffix[1:]: 0 for suffix in IMAGE_SUFFIXES}
_ROLE_OF_EXTENSION |= {"txt": 1, "cls": 2, "json": 3}

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_MEMBER_BYTES = 2**50  # headers can name sizes that no int64 holds
_MAX_RECORD_BYTES = 64 * 2**10  # of an extended header, which describes the next member
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]+)=")


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        cause: Short name for the counts.
        whole_shard: Whether the other samples of the shard are bad too.
    """

    def __init__(self, cause: str, *, whole_shard: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.whole_shard = whole_shard


class OpenShard:
    """An open tar with an index of its samples.

    A sample is a sequence of members with the same key. The key is the file name without its known
    extension and may contain dots. A key that comes twice makes two samples. Members with other
    extensions are never read.

    Args:
        file: A tar on a local file system; this object takes ownership.
        url: Name of the tar in messages.

    Attributes:
        keys: Key of every sample.
        repeated_keys: Number of samples with a key that came before.
        cut: Whether the tar is broken or ends within a member. The samples before are usable.

    Raises:
        BadSample: ``shard_unreadable``, when nothing in it can be read.
        OSError: when the file system fails, which says nothing about the shard.
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
        """Find all samples and return whether the tar is cut."""
        keys = self.keys
        end = 0
        try:
            for name, offset, size in _members(self._file, self._end):
                end = offset + size
                key, _, extension = name.rpartition(".")
                column = _ROLE_OF_EXTENSION.get(extension.lower())
                if column is None:
                    continue
                if not keys or keys[-1] != key or places[-1][column][0] >= 0:
                    keys.append(key)
                    places.append([(-1, 0)] * len(_ROLES))
                places[-1][column] = (offset, size)
        except _BrokenTarError:
            return True
        return end > self._end

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, index: int, role: Role, *, max_bytes: int) -> tuple[int, int]:
        """Return offset and size in bytes of one member of a sample, without reading it.

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
        """Read one member of the sample at ``index``.

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


class _BrokenTarError(ValueError):
    """There is no valid header where one is expected."""


class _Extension(TypedDict, total=False):
    """Values for a member from the extended headers before it."""

    name: str
    size: int
    sparse: bool


def _members(file: BinaryIO, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the regular files in a tar in V7, USTAR, GNU or pax format.

    The offset only increases, so the cost of a hostile tar is bounded by its length.

    Raises:
        _BrokenTarError: when the tar is broken at this place.
    """
    fd = file.fileno()
    offset = 0
    extension: _Extension | None = None
    while offset <= end:  # also at the end: reading there may raise an error
        header = os.pread(fd, _BLOCK, offset)
        if _ZEROS.startswith(header):
            break
        size, kind = _size(header), header[156:157]
        offset += _BLOCK
        if kind in (b"x", b"L", b"X", b"K", b"g"):
            records = _read_records(fd, offset, size)
            if kind != b"g":  # values for the whole tar: dates, comments
                # The first of several counts, as in tarfile.
                extension = {**_extended(kind, records), **(extension or {})}
        else:
            name, sparse = None, False
            if extension is not None:
                name, sparse = extension.get("name"), extension.get("sparse", False)
                size = extension.get("size", size)
            if name is None:
                name = _name(header)
            if kind == b"\0":  # V7 marks folders by a slash
                kind = b"5" if name.endswith("/") else b"0"
            if kind in (b"0", b"7"):
                if not sparse:
                    yield name, offset, size
            elif kind == b"S":
                offset = _after_sparse_map(fd, header, offset)
            elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0  # links, devices and folders have no content, whatever their size says
            extension = None
        offset += -(-size // _BLOCK) * _BLOCK
    if extension is not None:
        raise _BrokenTarError("the header of a member describes nothing")


def _size(header: bytes) -> int:
    """Return the size in bytes of the content after a header."""
    size, checksum = _number(header[124:136]), _number(header[148:156])
    # The checksum is the sum of all bytes, with its own field as blanks. The low half of Adler-32
    # is that sum plus 1, modulo 65521, and zlib is fast.
    unsigned = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if unsigned != (checksum + 1) % 65521:
        signed = sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:]) + 8 * 32
        if signed != checksum:  # some old programs sum signed bytes
            raise _BrokenTarError("checksum")
    if len(header) < _BLOCK or not 0 <= size <= _MAX_MEMBER_BYTES:
        raise _BrokenTarError("size")
    return size


def _number(field: bytes) -> int:
    """Parse octal digits, or GNU's binary form for larger numbers."""
    try:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except (ValueError, IndexError) as error:
        raise _BrokenTarError("number") from error


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _read_records(fd: int, offset: int, size: int) -> bytes:
    if size > _MAX_RECORD_BYTES:
        raise _BrokenTarError("records too long")
    records = os.pread(fd, size, offset)
    if len(records) < size:
        raise _BrokenTarError("records cut")
    return records


def _extended(kind: bytes, records: bytes) -> _Extension:
    """Return the values of a long name (L) or of pax records (x, X); of a long link (K), none."""
    if kind == b"L":
        return {"name": records.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    # Nearly all pax headers have only dates and owners, which a search finds quickly.
    if kind != b"K" and (b"path=" in records or b"size=" in records or b"GNU." in records):
        return _pax_extension(records)
    return {}


def _pax_extension(records: bytes) -> _Extension:
    values: _Extension = {}
    at = 0
    while at < len(records) and records[at]:
        found = _PAX_RECORD.match(records, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(records) or records[end - 1] != 0x0A:
            raise _BrokenTarError("pax record")
        key, content = found[2], records[found.end() : end - 1]
        if key == b"path":
            values["name"] = content.rstrip(b"/").decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not content.isdigit() or len(content) > 20 or int(content) > _MAX_MEMBER_BYTES:
                raise _BrokenTarError("pax size")
            values["size"] = int(content)
        elif key.startswith(b"GNU.sparse."):
            values["sparse"] = True
        at = end
    return values


def _after_sparse_map(fd: int, header: bytes, offset: int) -> int:
    """Return the offset of a GNU sparse file's content: its map may continue in further blocks."""
    continues = header[482]
    while continues:
        block = os.pread(fd, _BLOCK, offset)
        if len(block) < _BLOCK:
            raise _BrokenTarError("sparse map cut")
        continues = block[504]
        offset += _BLOCK
    return offset

"""The members of a tar in V7, USTAR, GNU or pax format: one pass over the headers.

Faster than tarfile by a factor of 2 to 8, and safe on damaged or hostile files.
"""

import os
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, TypedDict

__all__ = ["BrokenTarError", "Kind", "tar_members"]

#: A link is symbolic or hard. What is special (sparse files, devices) has no content to be read.
Kind = Literal["file", "link", "special"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_MEMBER_BYTES = 2**50  # headers can name sizes that no int64 holds
_MAX_RECORD_BYTES = 64 * 2**10  # of an extended header, which describes the next member
_MAX_PADDING = 64 * 2**10  # tars end with zeros up to a multiple of 10 KiB
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]+)=")


class BrokenTarError(ValueError):
    """There is no valid header where one is expected."""


class _Extension(TypedDict, total=False):
    """Values for a member from the extended headers before it."""

    name: str
    size: int
    sparse: bool


def tar_members(file: BinaryIO, end: int) -> Iterator[tuple[str, int, int, Kind]]:
    """Yield the members of a tar of ``end`` bytes except folders: name, place and kind.

    The place is the offset and size of a file's content in bytes. Bytes of a name that are not
    UTF-8 become surrogates.

    The offset only increases, so the cost of a hostile tar is bounded by its length.

    Raises:
        BrokenTarError: when the tar is broken at this place.
    """
    fd = file.fileno()
    offset = 0
    extension: _Extension | None = None
    while offset <= end:  # also at the end: reading there may raise an error
        header = os.pread(fd, _BLOCK, offset)
        if _ZEROS.startswith(header):
            if os.pread(fd, _MAX_PADDING, offset).strip(b"\0"):
                raise BrokenTarError("content after the end")  # a hole, or another tar
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
            if kind in (b"0", b"7") and not sparse:
                yield name, offset, size, "file"
            elif kind in (b"1", b"2"):
                yield name, offset, 0, "link"
            elif kind not in (b"5", b"D", b"V"):  # folders, and the label of a tar
                yield name, offset, 0, "special"
            if kind == b"S":
                offset = _after_sparse_map(fd, header, offset)
            elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0  # links, devices and folders have no content, whatever their size says
            extension = None
        offset += -(-size // _BLOCK) * _BLOCK
    if extension is not None:
        raise BrokenTarError("the header of a member describes nothing")


def _size(header: bytes) -> int:
    """Return the size in bytes of the content after a header."""
    size, checksum = _number(header[124:136]), _number(header[148:156])
    # The checksum is the sum of all bytes, with its own field as blanks. The low half of Adler-32
    # is that sum plus 1, modulo 65521, and zlib is fast.
    unsigned = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if unsigned != (checksum + 1) % 65521:
        signed = sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:]) + 8 * 32
        if signed != checksum:  # some old programs sum signed bytes
            raise BrokenTarError("checksum")
    if len(header) < _BLOCK or not 0 <= size <= _MAX_MEMBER_BYTES:
        raise BrokenTarError("size")
    return size


def _number(field: bytes) -> int:
    """Parse octal digits, or GNU's binary form for larger numbers."""
    try:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except (ValueError, IndexError) as error:
        raise BrokenTarError("number") from error


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _read_records(fd: int, offset: int, size: int) -> bytes:
    if size > _MAX_RECORD_BYTES:
        raise BrokenTarError("records too long")
    records = os.pread(fd, size, offset)
    if len(records) < size:
        raise BrokenTarError("records cut")
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
            raise BrokenTarError("pax record")
        key, content = found[2], records[found.end() : end - 1]
        if key == b"path":
            values["name"] = content.rstrip(b"/").decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not content.isdigit() or len(content) > 20 or int(content) > _MAX_MEMBER_BYTES:
                raise BrokenTarError("pax size")
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
            raise BrokenTarError("sparse map cut")
        continues = block[504]
        offset += _BLOCK
    return offset

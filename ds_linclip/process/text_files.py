"""Text files that people write: with the byte order marks and line ends of any editor."""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["encoding_of", "read_list", "read_text", "split_lines"]

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MARK = "\ufeff"
# Lines of programs, tables and lists of another kind.
_COMMENT = re.compile(r"#(?:\s.*)?")
_QUOTED = re.compile(r"""(["']).*\1(,?)""")
_SYNSET_FIRST = re.compile(r"n\d{8}[\s,;:].*")


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text that starts with these bytes."""
    return "utf-16" if start.startswith(_UTF16_MARKS) else "utf-8-sig"


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark, without such marks.

    A mark may stand anywhere: files that were joined have one in the middle.

    Raises:
        ValueError: naming the file, which cannot be read or is no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} must be a readable file: {error.strerror}") from error
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n?|\n", error.object[: error.start]))
        raise ValueError(f"line {line} of {path} must be text in UTF-8: {error.reason}") from error
    if "\0" in text:
        raise ValueError(f"{path} must be text in UTF-8: it holds zero bytes")
    return text.replace(_MARK, "")


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, which end with LF, CRLF or CR.

    ``str.splitlines`` also splits at characters that may be part of a line, such as U+0085.
    """
    return re.split(r"\r\n?|\n", text)


def read_list(path: Path) -> list[str]:
    """Return the entries of a file with one entry per line, without the spaces around them.

    The number of an entry is that of its line, so blank lines are allowed at the end only.

    Raises:
        ValueError: naming the file and the line, as :func:`read_text` or for a blank line, a
            comment, a line with a tab, entries in quotes or behind their numbers, as programs and
            tables have them, or a file without entries.
    """
    lines = [line.strip() for line in split_lines(read_text(path))]
    while lines and _is_blank(lines[-1]):
        lines.pop()
    if not lines:
        raise ValueError(f"{path} must not be empty: it holds one entry per line")
    for number, line in enumerate(lines, start=1):
        if _is_blank(line):
            raise ValueError(f"line {number} of {path} must not be blank: it holds one entry")
        if "\t" in line:
            raise ValueError(f"line {number} of {path} must hold one entry, without tabs: {line!r}")
        if _COMMENT.fullmatch(line):
            raise ValueError(f"line {number} of {path} must hold an entry, no comment: {line!r}")
    _check_entries_alone(path, lines)
    return lines


def _check_entries_alone(path: Path, lines: Sequence[str]) -> None:
    """Refuse the lines of a program or a table: their quotes or numbers would be part of names."""
    quotes = [_QUOTED.fullmatch(line) for line in lines]
    for number, (line, found) in enumerate(zip(lines, quotes, strict=True), start=1):
        if found and (found[2] or all(quotes)):
            raise ValueError(f"line {number} of {path} must hold an entry without quotes: {line!r}")
    for first in (0, 1):
        if len(lines) > 1 and all(
            line.startswith((f"{number},", f"{number};", f"{number}:"))
            for number, line in enumerate(lines, start=first)
        ):
            raise ValueError(
                f"line 1 of {path} must hold an entry without its number: {lines[0]!r}"
            )
    if all(map(_SYNSET_FIRST.fullmatch, lines)):
        raise ValueError(f"line 1 of {path} must hold one entry, id or name: {lines[0]!r}")


def _is_blank(line: str) -> bool:
    """Return whether nothing of a line shows; it may still hold zero-width characters."""
    return not any(character.isprintable() and character != " " for character in line)

"""Read the columns of images and captions from a table: csv with any separator, or parquet.

A table that is not what its header says is an error that names the line: a caption that is cut or
joined with the next row would train as if it were right.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ds_linclip.data.causes import format_cause
from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_index import IMAGE_SUFFIXES
from ds_linclip.process.text_files import encoding_of

__all__ = ["Text", "read_table"]

#: A caption of a further column; parquet may have lists, and None.
Text = str | list[str | None] | None

_MAX_FIELD = 2**31 - 1  # fits into a C long on every platform
_FURTHER = "further_columns"
_MAX_SHOWN = 500  # characters of a header, in a message


def read_table(
    file: Path,
    *,
    image_column: str,
    caption_column: str,
    separator: str,
    further_columns: Sequence[str] = (),
) -> tuple[list[str], list[str | None], Tally, dict[str, list[Text]]]:
    """Read columns of a table; its content tells whether it is csv or parquet.

    Args:
        file: A parquet file, or text with a header line in UTF-8, or in UTF-16 with a byte order
            mark.
        image_column, caption_column: The names of the columns.
        separator: The character between the fields of a text.
        further_columns: The names of columns with further captions; parquet may have lists there.

    Returns:
        The images, the captions (None where parquet has none), what was passed over, and the
        further captions by column. A byte that is not UTF-8 is a surrogate, as in file names of
        Python.

    Raises:
        ValueError: when the separator, the encoding, the header, a row or the quoting is invalid,
            or there are no rows.
        OSError: when the file cannot be read.
    """
    if len(separator) != 1 or separator in '"\r\n':
        raise ValueError(f"separator ({separator!r}) must be one character, no quote or line end")
    if image_column == caption_column:
        raise ValueError(f"image_column and caption_column ({caption_column}) must differ")
    names = {"image_column": image_column, "caption_column": caption_column}
    names |= {f"{_FURTHER}[{i}]": name for i, name in enumerate(further_columns)}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{_FURTHER} ({', '.join(further_columns)}) must be other columns, each once"
        )
    if dotted := [name for name in further_columns if "." in name]:
        raise ValueError(f"{_FURTHER} ({dotted[0]}) must have no dot: it becomes a JSON entry")
    with open(file, "rb") as content:
        start = content.read(64)
    if cause := format_cause(start):
        kind = cause.removeprefix("shard_").replace("_", " ")
        kind += ", as .xlsx is" if kind == "zip" else ""
        raise ValueError(f"source ({file}) must be text or parquet, not {kind}")
    passed_over = Tally()
    if start.startswith(b"PAR1"):
        images, captions, *further = _read_parquet(file, names)
    else:
        images, captions, *further = _read_csv(
            file, encoding_of(start), names, separator, passed_over
        )
    if not images:
        raise ValueError(f"source ({file}) must hold rows")
    by_column = dict(zip(further_columns, further, strict=True))
    return [image or "" for image in images], captions, passed_over, by_column


def _read_csv(
    file: Path, encoding: str, names: dict[str, str], separator: str, passed_over: Tally
) -> list[list[Any]]:
    """Return the columns of the names."""
    found: list[list[Any]] = [[] for _ in names]
    columns: list[str] = []
    read: list[str] = []  # lines since the last row
    # A caption that is not UTF-8, or very long, makes one bad sample, not a bad table.
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with open(file, encoding=encoding, errors=errors, newline="") as lines:
        reader = csv.reader(_noted(lines, read), delimiter=separator, strict=True)
        limit = csv.field_size_limit(_MAX_FIELD)
        try:
            for row in reader:
                if any("\0" in line for line in read):
                    raise _BadRowError("a NUL byte; the file must be UTF-8 text")
                if not row:
                    passed_over.add("blank_line", f"line {reader.line_num}")
                elif not columns:
                    columns = row
                    separated = f", separated by {separator!r},"
                    places = _find_columns(file, columns, names, separated)
                else:
                    _check_row(row, columns, read, separator, places[0], file.parent)
                    for column, place in zip(found, places, strict=True):
                        column.append(row[place])
                read.clear()
        except (csv.Error, _BadRowError) as error:
            # The csv module says "unexpected end of data".
            what = "a quote is not closed" if "unexpected end" in str(error) else str(error)
            line = reader.line_num - max(0, len(read) - 1)
            raise ValueError(f"source ({file}) must be a csv file: line {line}: {what}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"source ({file}) must be text in UTF-16: {error.reason}") from error
        finally:
            csv.field_size_limit(limit)  # it is global
    return found


class _BadRowError(ValueError):
    """A row that does not fit the header."""


def _noted(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """Yield the lines and append them to a list."""
    for line in lines:
        read.append(line)
        yield line


def _check_row(
    row: Sequence[str],
    columns: Sequence[str],
    lines: Sequence[str],
    separator: str,
    image: int,
    root: Path,
) -> None:
    """Check a row against the header, and the lines that it was read from against each other."""
    if len(row) != len(columns):
        hint = "; quote fields that contain the separator" if len(row) > len(columns) else ""
        raise _BadRowError(f"{len(row)} fields, where the header has {len(columns)}{hint}")
    if len(lines) == 1:
        return
    # A caption may have several lines, but only one of them belongs to an image.
    named = 0
    for line in lines:
        fields = line.rstrip("\r\n").replace('"', "").split(separator)
        # From either end, since the caption may contain the separator.
        places = {image, image - len(columns)} & set(range(-len(fields), len(fields)))
        named += any(_is_image(fields[place], root) for place in places)
    if named > 1:
        raise _BadRowError(
            f"a quote joins it with the next {len(lines) - 1} lines, although they name several "
            "images; close it, or write a quote within a quoted field twice"
        )


def _is_image(name: str, root: Path) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) or os.path.isfile(os.path.join(root, name))


def _find_columns(
    file: Path, columns: Sequence[str], names: dict[str, str], separation: str = ""
) -> list[int]:
    """Return the places of the named columns."""
    for name, value in names.items():
        if columns.count(value) != 1:
            times = f", not {columns.count(value)}" if value in columns else ""
            raise ValueError(
                f"{name} ({value}) must be a column of {file}{times}; its columns{separation} are "
                f"{', '.join(map(repr, columns))[:_MAX_SHOWN]}"
            )
    return [columns.index(value) for value in names.values()]


def _read_parquet(file: Path, names: dict[str, str]) -> list[list[Any]]:
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            places = _find_columns(file, schema.names, names)
            for name, place in zip(names, places, strict=True):
                kind = schema.types[place]
                if not (_is_text(kind) or (name.startswith(_FURTHER) and _is_list_of_texts(kind))):
                    raise ValueError(f"{name} ({schema.names[place]}) must hold text, not {kind}")
            columns = table.read(columns=list(names.values()))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"source ({file}) must be a parquet file: {reason}") from error
    return [[_decoded(each) for each in _as_bytes(columns.column(c))] for c in names.values()]


def _as_bytes(column: pa.ChunkedArray) -> list[Any]:
    kind = pa.large_binary()
    return column.cast(kind if _is_text(column.type) else pa.large_list(kind)).to_pylist()


def _decoded(value: bytes | list[bytes | None] | None) -> Text:
    if isinstance(value, list):
        return [None if each is None else _decode(each) for each in value]
    return None if value is None else _decode(value)


def _decode(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _is_list_of_texts(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and _is_text(kind.value_type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)

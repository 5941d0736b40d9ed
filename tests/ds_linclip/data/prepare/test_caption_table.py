"""Tables of images and captions: what is written comes back, or is an error that names a line."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data.prepare.caption_table import read_table

TEXTS = st.text(max_size=12) | st.text('ab,;\t" \r\n\\\u0085é.jpg', max_size=12)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
ROWS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=5)


def read(file: Path, separator: str = ",") -> tuple[list[str], list[str | None]]:
    return read_table(file, image_column="filepath", caption_column="title", separator=separator)[
        :2
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables") / "table"


@given(ROWS, st.permutations(["filepath", "title", "other"]), st.sampled_from(",\t;|"), ENCODINGS)
def test_csv_comes_back_or_is_an_error(
    file: Path, rows: list[tuple[str, ...]], columns: list[str], separator: str, encoding: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([columns, *rows])
    file.write_bytes(text.getvalue().encode(encoding))
    try:
        found = read(file, separator)
    except ValueError as error:
        message = str(error)
    else:
        places = columns.index("filepath"), columns.index("title")
        assert found == tuple([row[place] for row in rows] for place in places)
        return
    assert re.search(r"line \d+: (a NUL byte|a quote joins it)", message)
    assert "\0" in text.getvalue() or any("\n" in field or "\r" in field for field in sum(rows, ()))


@given(st.text('a,"\n\r\té', max_size=40))
def test_any_text_is_read_or_is_a_named_error(file: Path, text: str) -> None:
    file.write_text(f"filepath,title\n{text}", encoding="utf-8", newline="")
    try:
        images, captions = read(file)
    except ValueError as error:
        message = str(error)
    else:
        assert len(images) == len(captions) > 0
        assert sum(map(len, [*images, *map(str, captions)])) <= len(text)
        return
    assert str(file) in message
    assert "line " in message or "must hold rows" in message


@given(
    st.lists(st.tuples(TEXTS | st.none(), TEXTS | st.none(), st.integers(0, 9)), min_size=1),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_parquet_comes_back(file: Path, rows: list[tuple[Any, ...]], kind: pa.DataType) -> None:
    images, captions, numbers = zip(*rows, strict=True)
    table = {
        "other": numbers,
        "title": pa.array(captions, kind),
        "filepath": pa.array(images, kind),
    }
    pq.write_table(pa.table(table), file)
    assert read(file) == ([image or "" for image in images], list(captions))


def utf16(text: str) -> bytes:
    return text.encode("utf-16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filepath,title\na.jpg,a cat, on a mat\n", "line 2: 3 fields, where the header has 2"),
        (b"filepath,title\na.jpg,a\n\nb.jpg\n", "line 4: 1 fields, where the header has 2"),
        (b"filepath,title\na.jpg,a,\n", "line 2: 3 fields"),
        (b"title,filepath,title\n", "caption_column (title) must be a column of {}, not 2; its"),
        (b"filepath, title\na.jpg, b\n", "separated by ',', are 'filepath', ' title'"),
        (b"filepath\ttitle\na.jpg\tb\n", r"separated by ',', are 'filepath\ttitle'"),
        (b"Filepath,Title\n", "image_column (filepath) must be a column of"),
        (b"", "must hold rows"),
        (b"\n\n", "must hold rows"),
        (b"\xef\xbb\xbf", "must hold rows"),
        (b"filepath,title\n", "must hold rows"),
        (b'filepath,title\na.jpg,"a\nb.jpg,b\n', "line 2: a quote is not closed"),
        (b'filepath,title\na.jpg,x\nb.jpg,"a" b\n', "line 3: ',' expected after '\"'"),
        (b'filepath,title\na.jpg,"a\nb.jpg,b"\n', "line 2: a quote joins it with the next 1 lines"),
        (b'title,filepath\n"a, b,a.jpg\nc, d",b.jpg\n', "line 2: a quote joins it"),
        (b'filepath,title\n"a.jpg,a\nb.jpg",b\n', "line 2: a quote joins it"),
        (b"filepath,title\na.jpg,a\0b\n", "line 2: a NUL byte"),
        (utf16("filepath,title\na.jpg,b\n")[:-1], "must be text in UTF-16: truncated data"),
        (utf16("filepath,title\na.jpg,b\n")[2:], "line 1: a NUL byte"),
        (b"\x1f\x8b\x08\0", "must be text or parquet, not gzip"),
        (b"<!DOCTYPE html>", "must be text or parquet, not web page"),
        (b"PK\x03\x04", "not zip, as .xlsx is"),
        (b"PAR1 cut", "must be a parquet file"),
    ],
)
def test_broken_table_names_the_line(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message.format(file))) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_blank_lines(file: Path, end: bytes) -> None:
    lines = [b"", b"filepath,title,", b"a.jpg,one,", b"", b'b.jpg,"two', b'lines, ""so""",', b""]
    file.write_bytes(end.join(lines))
    images, captions, passed_over, _ = read_table(
        file, image_column="filepath", caption_column="title", separator=","
    )
    assert images == ["a.jpg", "b.jpg"]
    assert captions == ["one", f'two{end.decode()}lines, "so"']
    assert passed_over == {"blank_line": 2}
    assert passed_over.examples == {"blank_line": "line 1"}


def test_stray_quote_is_found_by_images_that_exist(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text('filepath,title\none,"a\ntwo,b"\n')
    with pytest.raises(ValueError, match="line 2: a quote joins it"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pa.array([1, 2]), "must hold text, not int64"),
        (lambda: pa.array([["a"], []]), "must hold text, not list<"),
        (lambda: pa.array([{"bytes": b"x", "path": "a"}] * 2), "must hold text, not struct<bytes"),
        (lambda: pa.array([b"a", None]), "must hold text, not binary"),
        (lambda: pa.nulls(2), "must hold text, not null"),
    ],
)
def test_parquet_column_of_another_type_is_refused(
    file: Path, make: Callable[[], pa.Array], message: str
) -> None:
    pq.write_table(pa.table({"filepath": ["a.jpg", "b.jpg"], "title": make()}), file)
    with pytest.raises(ValueError, match=re.escape(f"caption_column (title) {message}")):
        read(file)


def test_damaged_parquet_is_one_line(file: Path) -> None:
    pq.write_table(pa.table({"filepath": ["a.jpg"], "title": ["one"]}), file)
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    with pytest.raises(ValueError, match="must be a parquet file") as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_parquet_text_that_is_not_utf8_is_kept_for_the_sample_to_fail(file: Path) -> None:
    content = pa.array([b"good", b"b\xe4d"])
    bad = pa.Array.from_buffers(pa.string(), 2, content.buffers())
    pq.write_table(pa.table({"filepath": ["a.jpg", "b.jpg"], "title": bad}), file)
    assert read(file) == (["a.jpg", "b.jpg"], ["good", "b\udce4d"])


def test_columns_must_differ(file: Path) -> None:
    with pytest.raises(ValueError, match=r"image_column and caption_column \(a\) must differ"):
        read_table(file, image_column="a", caption_column="a", separator=",")

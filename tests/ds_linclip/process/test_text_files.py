"""Text files of any editor: byte order marks, line ends, blank lines."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.process.text_files import read_list, read_text, split_lines

#: Text within a line: str.splitlines would also split at U+0085, U+2028 or U+001C.
_LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\t\0\ufeff")).map(
    str.strip
)
_ENTRIES = _LINES.map(lambda line: f"x{line}")
_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists") / "list.txt"


@given(
    entries=st.lists(_ENTRIES, min_size=1, max_size=20),
    end=_ENDS,
    spaces=st.sampled_from(["", " ", "\u3000"]),
    blank=st.integers(0, 3),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_list_is_the_same_from_any_editor(file, entries, end, spaces, blank, encoding):
    lines = [f"{spaces}{entry}{spaces}" for entry in entries] + [spaces] * blank
    file.write_bytes(end.join(lines).encode(encoding))
    assert read_list(file) == [entry.strip() for entry in entries]


@given(
    entries=st.lists(_ENTRIES, min_size=2, max_size=20),
    end=_ENDS,
    blank=st.sampled_from(["", " ", "\t", "\u200b", "\u3000\u200e"]),
    data=st.data(),
)
def test_blank_line_between_entries_is_named(file, entries, end, blank, data):
    place = data.draw(st.integers(0, len(entries) - 1))
    entries.insert(place, blank)
    file.write_bytes(end.join(entries).encode())
    with pytest.raises(ValueError, match=rf"^line {place + 1} of .*list\.txt must not be blank"):
        read_list(file)


@given(lines=st.lists(_LINES, min_size=1), end=_ENDS)
def test_lines_end_nowhere_else(lines, end):
    assert split_lines(end.join(lines)) == lines


@given(content=st.binary(max_size=200))
def test_any_file_is_a_list_or_one_error(file, content):
    file.write_bytes(content)
    entries, message = ["none"], "list.txt must "
    try:
        entries = read_list(file)
    except ValueError as error:
        message = str(error)
    assert re.fullmatch(r".*list\.txt must .*", message)  # one line
    assert all(entry.strip() for entry in entries)
    assert not re.search("[\ufeff\0\r\n\t]", "".join(entries))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"list\.txt must not be empty"),
        (b"\xef\xbb\xbf\r\n \n", r"list\.txt must not be empty"),
        (b"cat\r\ncaf\xe9\r\n", r"line 2 of .*list\.txt must be text in UTF-8"),
        ("cat\ndog\n".encode("utf-16-le"), r"list\.txt must be text in UTF-8: it holds zero bytes"),
        (b"cat\n1\tdog\n", r"line 2 of .*list\.txt must hold one entry, without tabs: '1\\tdog'"),
        (b"# of my set\ncat\ndog\n", r"line 1 of .*list\.txt must hold an entry, no comment"),
        (b"cat\n#\ndog\n", r"line 2 of .*list\.txt must hold an entry, no comment: '#'"),
        (b"[\n'cat',\n'dog'\n]\n", r"line 2 of .* must hold an entry without quotes: \"'cat',\""),
        (b'"cat"\n"dog"\n', r"line 1 of .* must hold an entry without quotes: '\"cat\"'"),
        (b"0,cat\n1,dog\n", r"line 1 of .* must hold an entry without its number: '0,cat'"),
        (b"1: cat\n2: dog\n", r"line 1 of .* must hold an entry without its number: '1: cat'"),
        (b"n01440764 tench, Tinca\nn01443537 goldfish\n", r"line 1 of .* one entry, id or name"),
    ],
)
def test_what_is_no_list_is_named(file, content, message):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_list(file)


@pytest.mark.parametrize(
    "entries",
    [
        ["0", "1"],
        ["0 - zero", "1 - one"],
        ["0,5 l", "2,5 l"],
        ["#1", "#cats"],
        ["n01440764", "n01443537"],
        ['"{}" on a sign', 'a sign "{}"'],
        ["'s", "cat"],
        ['"Heroes"', "Low"],
    ],
)
def test_entries_with_numbers_marks_and_quotes_are_read(file, entries):
    file.write_text("\n".join(entries))
    assert read_list(file) == entries


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.txt must be a readable file: No such file"):
        read_text(tmp_path / "no.txt")
    with pytest.raises(ValueError, match=r"must be a readable file: Is a directory"):
        read_text(tmp_path)


def test_marks_of_joined_files_are_left_out(file):
    file.write_bytes("\ufeffcat\n\ufeffdog\n".encode())
    assert read_list(file) == ["cat", "dog"]

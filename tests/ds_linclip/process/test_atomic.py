import os
from pathlib import Path

import pytest

from ds_linclip.process.atomic import atomic_directory, atomic_file, write_atomically


def _fail_after_writing(path: Path) -> None:
    path.write_text("half")
    raise FileNotFoundError


@pytest.mark.parametrize("durable", [False, True])
def test_file_is_replaced_only_when_the_context_ends_well(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "facts.json"
    write_atomically(path, "old", durable=durable)
    with pytest.raises(FileNotFoundError), atomic_file(path, durable=durable) as partial:
        _fail_after_writing(partial)
    assert path.read_text() == "old"
    with atomic_file(path, durable=durable) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["facts.json"]


def test_text_is_utf8_and_bytes_stay(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "Åland")
    write_atomically(tmp_path / "b", b"\xff")
    assert (tmp_path / "a").read_bytes() == "Åland".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff"
    write_atomically(tmp_path / "c", os.fsdecode(b"\xe4.jpg"))
    assert (tmp_path / "c").read_bytes() == b"\xe4.jpg"


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "set"
    with pytest.raises(FileNotFoundError), atomic_directory(path) as partial:
        _fail_after_writing(partial / "file")
    assert os.listdir(path.parent) == []
    with atomic_directory(path) as partial:
        (partial / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert os.listdir(path.parent) == ["set"]


def test_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file").write_text("theirs")
    with pytest.raises(OSError), atomic_directory(tmp_path / "set") as partial:
        (partial / "file").write_text("ours")
    assert (tmp_path / "set" / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["set"]

"""The index of a tar: what is sound in it is found, what is not is named."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from ds_linclip.data.tar_index import BadSample, OpenShard

SAMPLE = [("jpg", b"image"), ("json", b"{}"), ("txt", b"caption")]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **arguments: int) -> None:
    with tarfile.open(path, "w", **arguments) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for key in keys for extension, content in SAMPLE]


def open_shard(path: Path) -> OpenShard:
    return OpenShard(path.open("rb"), str(path))


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_found_in_every_tar_format(tmp_path: Path, tar_format: int) -> None:
    long_key = "k" * 80 if tar_format == tarfile.USTAR_FORMAT else "k" * 200
    members = [(f"{key}.txt", key.encode()) for key in ("a", "with.dots", "ümlaut", long_key)]
    write_tar(tmp_path / "0.tar", members, format=tar_format)
    shard = open_shard(tmp_path / "0.tar")
    assert shard.keys == ["a", "with.dots", "ümlaut", long_key]
    texts = [shard.read(i, "text", max_bytes=1000).decode() for i in range(len(shard))]
    assert texts == shard.keys
    shard.close()


def test_repeated_keys_and_foreign_members(tmp_path: Path) -> None:
    members = [
        *members_of("same"),
        *members_of("same"),
        ("same.pkl", b"never read"),
        ("a.b.jpeg", b"dotted"),
        ("a.c.png", b"other"),
    ]
    write_tar(tmp_path / "0.tar", members)
    shard = open_shard(tmp_path / "0.tar")
    assert shard.keys == ["same", "same", "a.b", "a.c"]
    assert shard.repeated_keys == 1
    assert not shard.cut
    assert shard.read(2, "image", max_bytes=10) == b"dotted"
    assert shard.read(3, "image", max_bytes=10) == b"other"
    causes = []
    for index, role, limit in ((2, "text", 10), (0, "image", 4), (4, "image", 10)):
        with pytest.raises(BadSample) as caught:
            shard.read(index, role, max_bytes=limit)  # type: ignore[arg-type]
        causes.append(caught.value.cause)
    assert causes == ["text_missing", "image_too_many_bytes", "shard_short"]
    shard.close()


def test_cut_tar_keeps_what_lies_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    content = bytes(1000)
    write_tar(path, [(f"{i}.jpg", content) for i in range(5)])
    whole = path.read_bytes()
    # Header 512, content padded to 1024: samples begin every 1536 bytes.
    for cut, num_found, last_cause in ((3 * 1536, 3, None), (3 * 1536 + 700, 4, "image_cut")):
        path.write_bytes(whole[:cut])
        shard = open_shard(path)
        assert len(shard) == num_found
        # A cut between members shows only in the number of samples.
        assert shard.cut == (last_cause is not None)
        if last_cause is None:
            assert shard.read(num_found - 1, "image", max_bytes=2000) == content
        else:
            with pytest.raises(BadSample, match=last_cause):
                shard.read(num_found - 1, "image", max_bytes=2000)
        assert shard.read(0, "image", max_bytes=2000) == content
        shard.close()


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11])
def test_size_that_leads_nowhere_is_a_broken_header(tmp_path: Path, size: bytes) -> None:
    """A negative and a huge size: no place a file can be read at."""
    path = tmp_path / "0.tar"
    write_tar(path, [("a.txt", b"a"), ("b.txt", b"b")])
    content = bytearray(path.read_bytes())
    content[1024 + 124 : 1024 + 136] = size
    content[1024 + 148 : 1024 + 156] = b" " * 8
    content[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(content[1024:1536])
    path.write_bytes(content)
    shard = open_shard(path)
    assert shard.keys == ["a"]
    assert shard.cut
    assert shard.read(0, "text", max_bytes=10) == b"a"
    shard.close()


@pytest.mark.parametrize("content", [b"", b"garbage" * 500])
def test_tar_with_nothing_to_read_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(BadSample) as caught:
        open_shard(path)
    assert caught.value.cause == "shard_unreadable"
    assert caught.value.whole_shard


def test_bad_header_in_the_middle_is_a_cut(tmp_path: Path) -> None:
    """tarfile takes it for the end of the archive."""
    path = tmp_path / "0.tar"
    write_tar(path, members_of("a", "b", "c"))
    content = bytearray(path.read_bytes())
    content[3 * 1024 : 3 * 1024 + 512] = b"\x07" * 512
    path.write_bytes(content)
    shard = open_shard(path)
    assert (shard.keys, shard.cut) == (["a"], True)
    shard.close()
    content[3 * 1024 : 3 * 1024 + 512] = bytes(512)  # zeros are an end
    path.write_bytes(content)
    shard = open_shard(path)
    assert (shard.keys, shard.cut) == (["a"], False)
    shard.close()


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_index_is_that_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    """Names with folders, links, odd sizes, and extended headers that change nothing."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number in range(60):
            name = f"{'deep/' * (number % 7)}{number:04d}.{['jpg', 'txt'][number % 2]}"
            info = tarfile.TarInfo(name if number % 11 else f"{'long' * 30}/{name}")
            info.size = number * 37
            if tar_format == tarfile.PAX_FORMAT:
                info.mtime = 1234.5  # type: ignore[assignment]  # as webdataset writes it
            if number % 13 == 5:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    with tarfile.open(path) as tar:
        expected = [(m.name[:-4], tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
    shard = open_shard(path)
    found = []
    for index, key in enumerate(shard.keys):
        for role in ("image", "text"):
            try:
                found.append((key, shard.read(index, role, max_bytes=10_000)))  # type: ignore[arg-type]
            except BadSample:  # a key has one of the two
                continue
    assert found == expected
    assert not shard.cut
    shard.close()


def test_renamed_by_an_extended_header(tmp_path: Path) -> None:
    """A pax header that carries the name is tarfile's to read; so is a damaged one."""
    path = tmp_path / "0.tar"
    write_tar(path, [("a.txt", b"a"), ("ü" * 80 + ".txt", b"b"), ("c.txt", b"c")])
    shard = open_shard(path)
    assert shard.keys == ["a", "ü" * 80, "c"]
    assert [shard.read(i, "text", max_bytes=9) for i in range(3)] == [b"a", b"b", b"c"]
    shard.close()


def test_every_flipped_header_byte_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, members_of("a", "b"))
    sound = path.read_bytes()
    num_cut = 0
    for place in range(3 * 1024, 3 * 1024 + 512):
        damaged = bytearray(sound)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        shard = open_shard(path)
        assert (shard.keys, shard.cut) in ((["a"], True), (["a", "b"], False))
        num_cut += shard.cut
        shard.close()
    assert num_cut > 500

"""The index of a tar: what is sound in it is found, what is not is named."""

import bz2
import gzip
import io
import lzma
import multiprocessing
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data.causes import explain
from ds_linclip.data.tar_index import BadSample, OpenShard
from helpers.tar_files import members_of, write_tar


def open_shard(path: Path) -> OpenShard:
    return OpenShard(path.open("rb"), str(path))


def header(name: bytes, size: int | bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A header block with a sound checksum; a size in bytes is taken as the field itself."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = fields.get("magic", b"ustar\x0000")
    block[345 : 345 + len(fields.get("prefix", b""))] = fields.get("prefix", b"")
    block[482:483] = fields.get("sparse_goes_on", b"\0")
    return sealed(block)


def sealed(block: bytearray, error: int = 0) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) + error)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: bytes, content: bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    return header(name, len(content), kind, **fields) + padded(content)


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


SAMPLE = {"image": b"image", "text": b"caption"}
# Names of members, and the samples and counts of passed-over members that they make.
NAMES: dict[str, tuple[str, list[str], dict[str, int]]] = {
    "a second extension": ("0.jpg 0.seg.png 0.txt", ["0"], {"member_surplus": 1}),
    "before the key itself": ("0.mask.png 0.png 0.txt", ["0"], {"member_surplus": 1}),
    "two before it": ("0.a.png 0.b.png 0.jpg 0.txt", ["0"], {"member_surplus": 2}),
    "of three dots": ("d/0.jpg d/0.x.y.jpg d/0.txt", ["d/0"], {"member_surplus": 1}),
    "two known extensions": ("0.jpg 0.jpg.json 0.txt", ["0"], {}),
    "a thumbnail with a text": ("0.jpg 0.s.jpg 0.s.txt 0.txt", ["0", "0.s"], {}),
    "keys with dots": ("a.b.jpg a.b.txt a.c.jpg a.c.txt", ["a.b", "a.c"], {}),
    "a folder with a dot": ("a.jpg a.txt a.b/c.jpg a.b/c.txt", ["a", "a.b/c"], {}),
    "a key that is the start of a name": ("0.jpg 0.txt 01.jpg 01.txt", ["0", "01"], {}),
    "two images": ("0.jpg 0.png 0.txt", ["0"], {"member_surplus": 1}),
    "two images after the text": ("0.txt 0.JPG 0.jpg", ["0"], {"member_surplus": 1}),
    "upper case": ("0.JPEG 0.TXT", ["0"], {}),
    "a known sample twice": (
        "0.jpg 0.s.png 0.txt 0.jpg 0.s.png 0.txt",
        ["0", "0"],
        {"member_surplus": 2},
    ),
    "other extensions": ("0.jpg 0.npy 0.caption 0.txt", ["0"], {"member_extension": 2}),
    "files of macOS": (
        "./._0.jpg ./0.jpg ./._0.txt ./0.txt .DS_Store",
        ["./0"],
        {"member_hidden": 3},
    ),
    "folders of systems": (
        "__MACOSX/0.jpg x/PaxHeaders.12/0.jpg PaxHeaders/0.txt @eaDir/0.jpg x/0.jpg x/0.txt",
        ["x/0"],
        {"member_hidden": 4},
    ),
    "a hidden folder": (".data/0.jpg .data/0.txt", [".data/0"], {}),
    "no name but the extension": ("0/.jpg 0/.txt 1.jpg 1.txt", ["1"], {"member_hidden": 2}),
}


@pytest.mark.parametrize("case", NAMES)
def test_members_form_samples_by_their_names(tmp_path: Path, case: str) -> None:
    names, keys, passed_over = NAMES[case]
    members = []
    for name in names.split():
        role = "text" if name.lower().endswith("txt") else "image"
        is_read = name.rpartition(".")[0] in keys
        members.append((name, SAMPLE[role] if is_read else b"not read"))
    write_tar(tmp_path / "0.tar", members)
    shard = open_shard(tmp_path / "0.tar")
    assert shard.keys == keys
    assert shard.passed_over == passed_over
    for index in range(len(shard)):
        assert {
            "image": shard.read(index, "image", max_bytes=9),
            "text": shard.read(index, "text", max_bytes=9),
        } == SAMPLE
    shard.close()


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            *(("0.jpg", tarfile.REGTYPE), ("0.txt", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE)),
            *(("1.txt", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE)),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg" if name[0] == "1" else ""
            tar.addfile(info)
    shard = open_shard(tmp_path / "0.tar")
    assert shard.keys == ["0"]
    assert shard.passed_over == {"member_link": 2, "member_special": 1}
    assert shard.passed_over.examples == {"member_link": "1.jpg", "member_special": "pipe"}
    shard.close()


def cause_of(shard: OpenShard, index: int, role: str) -> str | None:
    try:
        shard.find(index, role, max_bytes=10)  # type: ignore[arg-type]
    except BadSample as error:
        return error.cause
    return None


def test_members_of_a_sample_must_stand_together(tmp_path: Path) -> None:
    keys, path = ["a", "b", "c"], tmp_path / "0.tar"
    write_tar(path, [(f"{key}.{end}", b"-") for end in ("jpg", "seg.png", "txt") for key in keys])
    shard = open_shard(path)
    assert (shard.keys, shard.repeated_keys) == (keys, 0)
    assert shard.passed_over == {"member_surplus": 3}
    assert shard.passed_over.examples == {"member_surplus": "a.seg.png"}
    causes = {(cause_of(shard, i, "image"), cause_of(shard, i, "text")) for i in range(3)}
    assert causes == {(None, "members_apart")}
    assert cause_of(shard, 0, "class") == "class_missing"
    shard.close()
    # What is not needed may stand anywhere.
    for extensions in (["json"], ["cls"]):
        pairs = [(f"{key}.{end}", b"-") for key in keys for end in ("jpg", "txt")]
        others = [(f"{key}.{end}", b"-") for key in keys for end in extensions]
        for members in (pairs + others, others + pairs):
            write_tar(path, members)
            shard = open_shard(path)
            assert shard.keys == keys
            assert {cause_of(shard, i, role) for i in range(3) for role in ("image", "text")} == {
                None
            }
            shard.close()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (gzip.compress(bytes(10240)), "shard_gzip"),
        (bz2.compress(bytes(10240)), "shard_bzip2"),
        (lzma.compress(bytes(10240)), "shard_xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "shard_zstd"),
        (b"\x04\x22\x4d\x18" + bytes(20), "shard_lz4"),
        (b"PK\3\4" + bytes(1000), "shard_zip"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html>" + b" " * 1000, "shard_web_page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "shard_git_lfs"),
        (bytes(10240), "shard_empty"),
        (member(b"0.bmp", b"BM") + bytes(1024), "shard_empty"),
    ],
)
def test_what_is_no_tar_of_samples_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(BadSample) as caught:
        open_shard(path)
    assert (caught.value.cause, caught.value.whole_shard) == (cause, True)
    assert explain(cause).startswith(f"{cause} (")


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
    content[3 * 1024 : 3 * 1024 + 512] = bytes(512)  # zeros are an end, but not in the middle
    path.write_bytes(content)
    shard = open_shard(path)
    assert (shard.keys, shard.cut) == (["a"], True)
    shard.close()


def test_tar_after_a_tar_is_a_cut(tmp_path: Path) -> None:
    """``cat`` joins tars, but what reads them stops at the end of the first."""
    path = tmp_path / "0.tar"
    write_tar(path, members_of("a"))
    path.write_bytes(2 * path.read_bytes())
    shard = open_shard(path)
    assert (shard.keys, shard.cut) == (["a"], True)
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


def contents_of(shard: OpenShard) -> list[tuple[str, bytes]]:
    """All images and texts."""
    found = []
    for index, key in enumerate(shard.keys):
        for role in ("image", "text"):
            try:
                found.append((key, shard.read(index, role, max_bytes=10_000)))  # type: ignore[arg-type]
            except BadSample:  # a key has one of the two
                continue
    return found


def assert_same_as_tarfile(path: Path) -> None:
    with tarfile.open(path, "r:") as tar:
        expected = [
            (member.name[:-4], tar.extractfile(member).read())  # type: ignore[union-attr]
            for member in tar
            if member.isreg() and not member.issparse() and member.name[-4:] in (".jpg", ".txt")
        ]
    shard = open_shard(path)
    assert contents_of(shard) == expected
    assert expected
    assert not shard.cut
    shard.close()


def pax(**records: bytes) -> bytes:
    content = b""
    for key, value in records.items():
        record = b" %s=%s\n" % (key.replace("__", ".").encode(), value)
        length = next(n for n in range(2**17) if n == len(record) + len(str(n)))
        content += b"%d" % length + record
    return member(b"pax", content, b"x")


def binary(number: int) -> bytes:
    """A size as GNU writes those too large for octal digits."""
    return (
        b"\xff" + (256**11 + number).to_bytes(11) if number < 0 else b"\x80" + number.to_bytes(11)
    )


LONG_NAME = member(b"././@LongLink", b"long.txt\0", b"L", magic=b"ustar  \0")
NONSENSE = b"5" * 12

SOUND_TARS = {
    "V7": member(b"a.txt", b"a", b"\0", magic=bytes(8))
    + member(b"folder/", b"", b"\0", magic=bytes(8))
    + member(b"b.jpg", b"b" * 700, b"\0", magic=bytes(8)),
    "GNU long name": LONG_NAME + member(b"short.txt", b"a", magic=b"ustar  \0"),
    "GNU long link": member(b"././@LongLink", b"target", b"K")
    + header(b"link.txt", 0, b"2")
    + member(b"a.txt", b"a"),
    "prefix": member(b"a.txt", b"a", prefix=b"folder/" * 20),
    "contiguous file": member(b"a.txt", b"a", b"7"),
    "binary size": header(b"a.txt", binary(3)) + padded(b"abc") + member(b"b.txt", b"b"),
    "links that claim a size": header(b"link.txt", 3, b"1") + member(b"a.txt", b"a"),
    "unknown kinds": member(b"strange.txt", b"content" * 100, b"Q") + member(b"a.txt", b"a"),
    "other encodings": member(b"\xe4.txt", b"a") + member("ü東.txt".encode(), b"b"),
    "pax path": pax(mtime=b"12.5", path="ü/long.txt".encode()) + member(b"short.txt", b"a"),
    "pax path of bytes": pax(hdrcharset=b"BINARY", path=b"\xe4.txt") + member(b"short.txt", b"a"),
    "pax size": pax(size=b"700")
    + header(b"a.txt", 0)
    + padded(b"a" * 700)
    + member(b"b.txt", b"b"),
    "pax size of a link": pax(size=b"700") + header(b"l.txt", 0, b"2") + member(b"b.txt", b"b"),
    "pax of the whole tar": member(b"pax", b"17 comment=hello\n", b"g") + member(b"a.txt", b"a"),
    "the first name counts": pax(path=b"first.txt") + LONG_NAME + member(b"short.txt", b"a"),
    "GNU sparse file": header(b"s.txt", 0, b"S", sparse_goes_on=b"\1")
    + (bytes(504) + b"\1" + bytes(7))
    + bytes(512)
    + member(b"a.txt", b"a"),
    "pax sparse file": pax(GNU__sparse__size=b"4", GNU__sparse__numblocks=b"0")
    + member(b"s.txt", b"a" * 4)
    + member(b"a.txt", b"a"),
    "signed checksum": header(b"a.txt", 0) + sealed(bytearray(header(b"\xe4.txt", 0)), -256),
}


@pytest.mark.parametrize("case", SOUND_TARS)
def test_unusual_tars_are_read_as_tarfile_reads_them(tmp_path: Path, case: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(SOUND_TARS[case] + bytes(1024))
    assert_same_as_tarfile(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--format=v7",),
        ("--format=ustar",),
        ("--format=gnu", "-S"),
        ("--format=pax", "-S"),
        ("--format=pax", "-S", "--sparse-version=0.0"),
        ("--format=pax", "-S", "--sparse-version=0.1"),
    ],
)
def test_tars_of_gnu_tar_are_read_as_tarfile_reads_them(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "ü.jpg"):
        (folder / name).write_bytes(name.encode() * 300)
    if "-S" in arguments:  # names longer than 100 bytes, and holes
        (folder / ("long" * 30 + ".txt")).write_bytes(b"long")
        for number in range(2):
            with (folder / f"hole{number}.txt").open("wb") as file:
                for place in range(30 * number + 1):
                    file.seek((place + 1) * 2**17)
                    file.write(b"x" * 5000)
    (folder / "link.txt").symlink_to("a.txt")
    (folder / "hard.txt").hardlink_to(folder / "b.txt")
    path = tmp_path / "0.tar"
    subprocess.run(["tar", *arguments, "-cf", path, "-C", folder, "."], check=True)
    assert_same_as_tarfile(path)


@pytest.mark.parametrize("mode", [None, 0o444])
def test_tars_of_webdataset_are_read(tmp_path: Path, mode: int | None) -> None:
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path), **({} if mode is None else {"mode": mode})) as writer:
        for key in ("a", "with.dots", "ü", "k" * 200):
            writer.write({"__key__": key, "txt": key, "jpg": b"image", "json": {"key": key}})
    assert_same_as_tarfile(path)


BEFORE = b"".join(member(b"%d.%s" % (i, e), b"x" * 10) for i in range(3) for e in (b"txt", b"jpg"))
# A tar whose end is not sound is cut.
HOSTILE_TARS = {
    "long names in a row": (LONG_NAME * 20_000 + member(b"z.txt", b"z"), False),
    "pax headers in a row": (pax(path=b"a.txt") * 20_000 + member(b"z.txt", b"z"), False),
    "sparse maps in a row": (
        header(b"s", 0, b"S", sparse_goes_on=b"\1") + b"\1" * 512 * 20_000 + bytes(512),
        False,
    ),
    "sparse map without an end": (
        header(b"s", 0, b"S", sparse_goes_on=b"\1") + b"\1" * 512 * 20_000,
        True,
    ),
    "long name that describes nothing": (LONG_NAME, True),
    "records without a key": (member(b"pax", b"path=" + b"1" * 60_000, b"x"), True),
    "records of no length": (member(b"pax", b"0 path=a\n", b"x"), True),
    "records beyond the end": (member(b"pax", b"99 path=a\n", b"x"), True),
    "name of 65 KiB": (member(b"L", b"a" * 65 * 2**10, b"L") + member(b"z.txt", b"z"), True),
    **{
        f"{kind!r} of {size}": (header(b"h", binary(size), kind) + padded(NONSENSE), True)
        for kind in (b"L", b"K", b"x", b"X", b"g", b"S", b"0", b"1", b"Q")
        for size in (-512, -1024, 2**62, 2**80)
    },
    **{
        f"{kind!r} of 2**40": (header(b"h", binary(2**40), kind) + padded(NONSENSE), True)
        for kind in (b"L", b"K", b"x", b"X", b"g")
    },
    **{
        f"pax size {size!r}": (pax(size=size) + member(b"z.txt", b"z"), True)
        for size in (b"-2048", b"9" * 23, b"", b"1_0", b"0x10", "²".encode())
    },
    "pax sparse nonsense": (pax(GNU__sparse__map=b"a,b") + member(b"z.txt", b"z"), False),
}


def scan_all(path: Path, tars: dict[str, tuple[bytes, bool]]) -> None:
    for case, (content, is_cut) in tars.items():
        path.write_bytes(BEFORE + content + (b"" if is_cut else bytes(1024)))
        shard = open_shard(path)
        assert shard.keys[:3] == ["0", "1", "2"], case
        assert len(shard) <= 4, case
        assert shard.cut == is_cut, case
        shard.close()


def scan_flipped(path: Path, sound: bytes) -> None:
    """Bits and bytes of headers change, and the checksums with them."""
    rng = random.Random(0)
    places = [*range(100), *range(345, 512), *[124, 125, 134] * 40, *[156] * 200]
    num_unreadable = num_cut = 0
    for _ in range(3000):
        damaged = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            first = 512 * rng.randrange(len(sound) // 512)
            for place in rng.choices(places, k=2):
                damaged[first + place] = rng.choice(b"01257LKxgXS=- \0\7\x80\xff")
            damaged[first : first + 512] = sealed(damaged[first : first + 512])
        path.write_bytes(damaged)
        try:
            shard = open_shard(path)
        except BadSample as error:
            assert error.cause in ("shard_unreadable", "shard_empty")  # noqa: PT017
            num_unreadable += 1
            continue
        num_cut += shard.cut
        last = 0
        for index in range(len(shard)):
            for role in ("image", "text", "meta"):
                try:
                    offset, size = shard.find(index, role, max_bytes=2**50)  # type: ignore[arg-type]
                except BadSample:
                    continue
                assert 512 <= offset <= len(damaged)
                assert offset % 512 == 0
                assert size >= 0
                assert offset + size <= len(damaged) or shard.cut
                last = max(last, offset)
        shard.close()
    assert num_unreadable > 5
    assert num_cut > 500


def run_in_time(target: Callable[..., None], *arguments: object) -> None:
    """A process of its own makes an endless loop end."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0


def test_hostile_tars_are_cut_in_time(tmp_path: Path) -> None:
    run_in_time(scan_all, tmp_path / "0.tar", HOSTILE_TARS)


def test_flips_under_a_sound_checksum_are_survived(tmp_path: Path) -> None:
    sound = BEFORE + LONG_NAME + member(b"l.txt", b"a") + pax(path=b"p.jpg", size=b"9")
    sound += member(b"p.jpg", b"b" * 9) + SOUND_TARS["GNU sparse file"] + bytes(1024)
    run_in_time(scan_flipped, tmp_path / "0.tar", sound)


ROLES = {"jpg": "image", "JPG": "image", "png": "image", "txt": "text", "cls": "class"}
ROLES |= {"json": "meta"}
NAME = st.builds(
    lambda folder, stem, extensions, extension: f"{folder}{stem}{extensions}.{extension}",
    st.sampled_from(["", "", "", "./", "d/", "d.e/", "__MACOSX/"]),
    st.sampled_from(["0", "0", "0", "1", "01", "ä b", "\udce4", "k" * 120, "._0", "0\n"]),
    st.sampled_from(["", "", "", ".seg", ".1", ".jpg", ".1.seg"]),
    st.sampled_from([*ROLES, "jpg", "txt", "npy"]),
)
KIND = st.sampled_from([tarfile.REGTYPE] * 9 + [tarfile.SYMTYPE, tarfile.DIRTYPE])


def expected_samples(files: list[tuple[str, bytes]]) -> list[tuple[str, dict[str, bytes | None]]]:
    """The samples by their definition; None: the member stands apart from the others."""
    members = []  # key, extension, content
    for name, content in files:
        key, _, extension = name.rpartition(".")
        folders, _, base = name.rpartition("/")
        if extension in ROLES and not base.startswith(".") and "__MACOSX" not in folders:
            members.append((key, extension, content))
    samples: list[dict[str, int]] = []  # numbers of members by extension; the first by role counts
    for number, (key, extension, _) in enumerate(members):
        for sample in samples:
            last = max(sample.values())
            between = members[last + 1 : number]
            is_same = members[last][0] == key and extension not in sample
            if is_same and all(other.startswith(f"{key}.") for other, _, _ in between):
                sample[extension] = number
                break
        else:
            samples.append({extension: number})
    keys = {key for key, _, _ in members}
    found: list[tuple[str, dict[str, bytes | None]]] = []
    for sample in samples:
        parts: dict[str, bytes | None] = {}
        for extension, number in sample.items():
            parts.setdefault(ROLES[extension], members[number][2])
        key = members[min(sample.values())][0]
        is_complete = parts.keys() >= {"image", "text"} or parts.keys() >= {"image", "class"}
        base = key[key.rfind("/") + 1 :].split(".")
        shorter = {key[: len(key) - len(".".join(base[i:])) - 1] for i in range(1, len(base))}
        if not is_complete and shorter & keys:
            continue
        last = next((other for other in reversed(found) if other[0] == key), None)
        if last is None or last[1].keys() & parts.keys():
            found.append((key, parts))
        elif is_complete:
            parts |= dict.fromkeys(last[1])
            last[1].clear()
            last[1].update(parts)
        else:
            last[1].update(dict.fromkeys(parts))
    return found


@given(
    members=st.lists(st.tuples(NAME, KIND), max_size=14),
    tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_samples_are_those_of_the_members_that_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, bytes]],
    tar_format: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, (name, kind) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, content = kind, b"%d" % number
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        files = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
        num_not_folders = sum(not m.isdir() for m in tar)
    expected = expected_samples(files)
    try:
        shard = open_shard(path)
    except BadSample as error:
        assert error.cause == "shard_empty"  # noqa: PT017
        assert expected == []
        passed_over, num_read = error.passed_over, 0
    else:
        found = []
        for index, key in enumerate(shard.keys):
            parts: dict[str, bytes | None] = {}
            for role in ("image", "text", "class", "meta"):
                cause = cause_of(shard, index, role)
                if cause is None:
                    parts[role] = shard.read(index, role, max_bytes=10)  # type: ignore[arg-type]
                elif cause == "members_apart":
                    parts[role] = None
            found.append((key, parts))
        assert found == expected
        passed_over, num_read = shard.passed_over, sum(len(parts) for _, parts in found)
        shard.close()
    # Nothing is lost in silence, but what no one reads: json beside a sample it does not belong to.
    num_passed = passed_over.total()
    num_json = sum(name.endswith("json") for name, _ in members)
    assert num_not_folders - num_json <= num_read + num_passed <= num_not_folders


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), unique=True))
def test_every_key_that_webdataset_writes_is_found(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    keys = [key for key in keys if not key.rpartition("/")[2].startswith(".")]
    keys = [key for key in keys if not key.endswith("/")]
    path = tmp_path_factory.getbasetemp() / "webdataset.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key in keys:
            writer.write({"__key__": key, "jpg": key.encode(), "txt": key.encode()[::-1]})
    if not keys:
        return
    shard = open_shard(path)
    assert shard.keys == keys
    for index, key in enumerate(keys):
        assert shard.read(index, "image", max_bytes=1000) == key.encode()
        assert shard.read(index, "text", max_bytes=1000) == key.encode()[::-1]
    shard.close()

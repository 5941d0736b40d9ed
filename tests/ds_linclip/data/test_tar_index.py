"""The index of a tar: what is sound in it is found, what is not is named."""

import io
import multiprocessing
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from ds_linclip.data.tar_index import BadSample, OpenShard
from helpers.tar_files import members_of, write_tar


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
            assert error.cause == "shard_unreadable"  # noqa: PT017
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

"""Patterns, sizes, and the index of a tar: what is sound in it is found, what is not is named."""

import io
import json
import os
import resource
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_linclip.data.shards import (
    BadSample,
    OpenShard,
    Shard,
    ShardCache,
    find_shards,
    raise_file_limit,
)

SAMPLE = [("jpg", b"image"), ("json", b"{}"), ("txt", b"caption")]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **arguments: int) -> None:
    with tarfile.open(path, "w", **arguments) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for key in keys for extension, content in SAMPLE]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Within it this process cannot open another file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_file = os.open(os.devnull, os.O_RDONLY)
    os.close(next_file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_sizes_come_from_statistics_then_parquet_then_headers(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"0000{number}.tar", members_of("a", "b"))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 9, "successes": 7}))
    rows = [{"status": "success"}] * 4 + [{"status": "failed_to_download"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00001.parquet")
    shards = find_shards([f"{tmp_path}/{{00000..00002}}.tar"])
    assert [shard.num_samples for shard in shards] == [7, 4, 2]
    assert [Path(shard.path).name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none/{0..3}.tar", r"data\.train \(.*none/\{0\.\.3\}\.tar\) matches no file"),
        ("{00000..00004}.tar", r"data\.train .* 4 of 5 are missing, first .*00001\.tar"),
        ("{00000..00004.tar", r"data\.train .* must be a valid brace pattern"),
    ],
)
def test_bad_patterns_are_named(tmp_path: Path, pattern: str, message: str) -> None:
    write_tar(tmp_path / "00000.tar", members_of("a"))
    with pytest.raises(ValueError, match=message):
        find_shards([f"{tmp_path}/{pattern}"])


def test_commands_and_schemes_are_refused(tmp_path: Path) -> None:
    for pattern in (f"pipe:touch {tmp_path}/run", "s3://bucket/0.tar"):
        with pytest.raises(ValueError, match=r"data\.train \(.*\) must be a local path"):
            find_shards([pattern])
    assert not list(tmp_path.iterdir())


def test_unreadable_statistics_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", members_of("a"))
    (tmp_path / "00000_stats.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"data\.train .* must have a readable .*00000_stats\.json"
    ):
        find_shards([f"{tmp_path}/00000.tar"])


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_found_in_every_tar_format(tmp_path: Path, tar_format: int) -> None:
    long_key = "k" * 80 if tar_format == tarfile.USTAR_FORMAT else "k" * 200
    members = [(f"{key}.txt", key.encode()) for key in ("a", "with.dots", "ümlaut", long_key)]
    write_tar(tmp_path / "0.tar", members, format=tar_format)
    shard = OpenShard(str(tmp_path / "0.tar"))
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
    shard = OpenShard(str(tmp_path / "0.tar"))
    assert shard.keys == ["same", "same", "a.b", "a.c"]
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
        shard = OpenShard(str(path))
        assert len(shard) == num_found
        if last_cause is None:
            assert shard.read(num_found - 1, "image", max_bytes=2000) == content
        else:
            with pytest.raises(BadSample, match=last_cause):
                shard.read(num_found - 1, "image", max_bytes=2000)
        assert shard.read(0, "image", max_bytes=2000) == content
        shard.close()


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "shard_missing"), (b"garbage" * 500, "shard_unreadable")],
)
def test_lost_shards_are_named_and_remembered(
    tmp_path: Path, content: bytes | None, cause: str
) -> None:
    path = tmp_path / "0.tar"
    if content is not None:
        path.write_bytes(content)
    cache = ShardCache([Shard(str(path), 3)], capacity=2)
    for _ in range(2):
        with pytest.raises(BadSample) as caught:
            cache.get(0)
        assert caught.value.cause == cause
        assert caught.value.whole_shard


def test_want_of_file_descriptors_is_no_lost_shard(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, members_of("a"))
    cache = ShardCache([Shard(str(path), 1)], capacity=2)
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        cache.get(0)
    assert cache.get(0).keys == ["a"]
    with no_more_files():
        raise_file_limit()
        OpenShard(str(path)).close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard


def test_failing_file_system_is_no_broken_shard(tmp_path: Path) -> None:
    """The start of a process' memory cannot be read: the kernel answers EIO."""
    path = tmp_path / "0.tar"
    path.symlink_to("/proc/self/mem")
    cache = ShardCache([Shard(str(path), 1)], capacity=2)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            cache.get(0)


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
    shard = OpenShard(str(path))
    assert shard.keys == ["a"]
    assert shard.read(0, "text", max_bytes=10) == b"a"
    shard.close()


def test_cache_is_bounded(tmp_path: Path) -> None:
    shards = []
    for number in range(4):
        path = tmp_path / f"{number}.tar"
        write_tar(path, members_of("a"))
        shards.append(Shard(str(path), 1))
    cache = ShardCache(shards, capacity=2)
    first = cache.get(0)
    second = cache.get(1)
    assert cache.get(0) is first
    cache.get(2)  # 1 was used least recently
    assert cache.get(0) is first
    assert cache.get(1) is not second
    with pytest.raises(ValueError, match="closed file"):
        second.read(0, "image", max_bytes=10)

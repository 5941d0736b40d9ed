"""Sources: which shards they name, how many samples each holds, and in which shares they come."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_linclip.config import CacheConfig, NetworkConfig, Source
from ds_linclip.data import Storage, find_shards
from ds_linclip.data.shard_index import ShardGroup
from helpers.misbehaving_server import MisbehavingServer, status, whole
from helpers.tar_files import members_of, write_tar


def find(*sources: Source | str) -> list[ShardGroup]:
    as_sources = [Source(shards=s) if isinstance(s, str) else s for s in sources]
    return find_shards(as_sources, Storage(CacheConfig(), NetworkConfig()))


def test_sizes_come_from_statistics_then_parquet_then_headers(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"0000{number}.tar", members_of("a", "b"))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 9, "successes": 7}))
    rows = [{"status": "success"}] * 4 + [{"status": "failed_to_download"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00001.parquet")
    (group,) = find(f"{tmp_path}/{{00000..00002}}.tar")
    assert [shard.num_samples for shard in group.shards] == [7, 4, 2]
    names = [Path(shard.url).name for shard in group.shards]
    assert names == ["00000.tar", "00001.tar", "00002.tar"]
    assert group.samples_per_epoch == 13


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
        find(f"{tmp_path}/{pattern}")


def test_commands_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train \(pipe:.*\)"):
        find(f"pipe:touch {tmp_path}/run")
    assert not list(tmp_path.iterdir())


def write_numbered(folder: Path, *sizes: int) -> str:
    """One tar per size, no statistics; returns the pattern."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number}.tar", members_of(*(f"k{i}" for i in range(size))))
    return f"{folder}/{{0..{len(sizes) - 1}}}.tar"


def test_sizes_file_spares_asking_for_each_shard(tmp_path: Path) -> None:
    pattern = write_numbered(tmp_path, 1, 2, 3)
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 5, "1.tar": 6, "2.tar": 7}))
    (group,) = find(pattern)
    assert [shard.num_samples for shard in group.shards] == [5, 6, 7]


def test_num_samples_fills_in_unknown_sizes(tmp_path: Path) -> None:
    pattern = write_numbered(tmp_path, 1, 2, 3)
    (tmp_path / "2_stats.json").write_text(json.dumps({"successes": 40}))
    (group,) = find(Source(shards=pattern, num_samples=101))
    assert [shard.num_samples for shard in group.shards] == [30, 31, 40]
    assert [shard.exact for shard in group.shards] == [False, False, True]


@pytest.mark.parametrize(
    ("files", "num_samples", "message"),
    [
        (
            {"sizes.json": {"0.tar": 5, "1.tar": 6}, "1_stats.json": {"successes": 7}},
            None,
            r"data\.train .*: sizes\.json \(6\) and _stats\.json \(7\) must agree on .*1\.tar",
        ),
        (
            {"sizes.json": {"0.tar": 5, "1.tar": 6}},
            12,
            r"data\.train \(.*\): num_samples \(12\) must equal .* \(11\)",
        ),
        ({"0_stats.json": {"successes": 5}}, 4, r"num_samples \(4\) must be at least .* \(5\)"),
        ({"0_stats.json": {"count": 5}}, None, r"0_stats\.json must hold numbers .* None"),
        ({"sizes.json": {"0.tar": -1}}, None, r"sizes\.json must hold numbers .* -1"),
        ({"sizes.json": [1]}, None, r"sizes\.json must hold an object"),
    ],
)
def test_sizes_that_disagree_are_named(
    tmp_path: Path, files: dict[str, object], num_samples: int | None, message: str
) -> None:
    pattern = write_numbered(tmp_path, 1, 1)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        find(Source(shards=pattern, num_samples=num_samples))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"0\.tar must be a readable tar: shard_empty \(a tar without samples\)$"),
        ([("0.bmp", b"")], r"shard_empty \(.*\); member_extension \(unknown; .*\): 1 \(0\.bmp\)"),
        (None, r"shard_gzip \(compressed with gzip; unpack it with: gzip -dc OLD > NEW\.tar\)"),
    ],
)
def test_shard_without_samples_is_named_with_the_reason(
    tmp_path: Path, members: list[tuple[str, bytes]] | None, message: str
) -> None:
    write_tar(tmp_path / "0.tar", members or [])
    if members is None:
        (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match=rf"data\.train .*{message}"):
        find(f"{tmp_path}/0.tar")


def test_shard_that_comes_twice_is_named(tmp_path: Path) -> None:
    pattern = write_numbered(tmp_path, 4, 6)
    with pytest.raises(ValueError, match=r"data\.train \(.*1\.tar\) must come once, not 2 times"):
        find(pattern, f"{tmp_path}/1.tar")


def test_many_shards_are_not_counted_by_their_headers(tmp_path: Path) -> None:
    pattern = write_numbered(tmp_path, *[1] * 300)
    with pytest.raises(ValueError, match=r"300 of 300 shards .* shards inspect .*--write-sizes"):
        find(pattern)
    (group,) = find_shards(
        [Source(shards=pattern)], Storage(CacheConfig(), NetworkConfig()), count_headers=False
    )
    assert {(shard.num_samples, shard.exact) for shard in group.shards} == {(0, False)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{memory,memory}://a/0.tar", r"memory://a/0\.tar\) must be a local path or have a scheme"),
        ("{/none,pipe:touch run}/0.tar", r"data\.train \(pipe:.*\) .* commands are not run"),
        ("/a\0b.tar", r"data\.train \(/a.b\.tar\) cannot be read: embedded null byte"),
    ],
)
def test_what_braces_expand_to_is_checked(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(pattern)


def test_sources_of_equal_upsampling_are_shuffled_as_one(tmp_path: Path) -> None:
    patterns = [write_numbered(tmp_path / name, 4, 6) for name in "abc"]
    groups = find(patterns[0], Source(shards=patterns[1], upsampling=2.5), patterns[2])
    assert [len(group.shards) for group in groups] == [4, 2]
    assert [group.samples_per_epoch for group in groups] == [20, 25]


def test_weights_are_shares_of_an_epoch_of_all_samples(tmp_path: Path) -> None:
    patterns = [write_numbered(tmp_path / "a", 4, 6), write_numbered(tmp_path / "b", 11)]
    groups = find(Source(shards=patterns[0], weight=1.0), Source(shards=patterns[1], weight=3.0))
    assert [group.samples_per_epoch for group in groups] == [5, 16]


def test_unreadable_statistics_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", members_of("a"))
    (tmp_path / "00000_stats.json").write_text("{")
    with pytest.raises(ValueError, match=r"data\.train .* must be readable JSON"):
        find(f"{tmp_path}/00000.tar")


def test_query_of_a_url_stays_behind_the_names_of_side_files(server: MisbehavingServer) -> None:
    base = server.url("/a/0.tar?token=secret", whole(b"tar")).partition("/a/")[0]
    server.url("/a/0_stats.json?token=secret", whole(b'{"successes": 5}'))
    (group,) = find(f"{base}/a/0.tar?token=secret")
    assert [shard.num_samples for shard in group.shards] == [5]
    server.url("/b/sizes.json?token=secret", whole(b'{"0.tar": 7, "1.tar": 8}'))
    (group,) = find(f"{base}/b/{{0..1}}.tar?token=secret")
    assert [shard.num_samples for shard in group.shards] == [7, 8]


def test_store_that_refuses_absent_files_needs_num_samples(server: MisbehavingServer) -> None:
    pattern = server.url("/0.tar", whole(b"tar"))
    for name in ("/sizes.json", "/0_stats.json", "/0.parquet"):
        server.url(name, status(403))
    with pytest.raises(ValueError, match=r"must have sizes\.json, .* or the source num_samples"):
        find(pattern)
    (group,) = find(Source(shards=pattern, num_samples=9))
    assert [shard.num_samples for shard in group.shards] == [9]
    server.url("/0.tar", status(403))
    with pytest.raises(ValueError, match=r"data\.train \(.*0\.tar\) cannot be reached: .*refused"):
        find(Source(shards=pattern, num_samples=9))


def test_no_message_contains_a_secret(server: MisbehavingServer) -> None:
    url = server.url("/0.tar?token=secret", status(403)).replace("//", "//user:secret@")
    wrong = server.url("/1.tar?token=secret", whole(b"tar")).replace("//", "//user:secret@")
    server.url("/1_stats.json?token=secret", whole(b"{"))
    missing = url.replace("0.tar", "{2..3}.tar")
    for pattern in (url, wrong, missing, url.replace("http", "htp"), url + "{"):
        with pytest.raises(ValueError, match=r"data\.train \(ht") as caught:
            find(pattern)
        assert "secret" not in str(caught.value)

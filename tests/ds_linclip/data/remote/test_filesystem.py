"""Remote shards over real servers: what breaks goes on, what is wrong is named, secrets stay."""

import itertools
import logging
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote import Storage, check_url, is_remote, redact
from ds_linclip.data.remote.backends import RemoteError
from ds_linclip.data.remote.cache import CacheError
from helpers.misbehaving_server import MisbehavingServer, status, whole
from helpers.stored_content import CONTENT, HALF, OTHER, content_of, copies, make_storage


def test_fetched_once_then_from_the_copy(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    url = server.url("/a/00000.tar", whole(CONTENT))
    assert [content_of(storage, url) for _ in range(3)] == [CONTENT] * 3
    assert content_of(pickle.loads(pickle.dumps(storage)), url) == CONTENT
    assert len(server.requests["/a/00000.tar"]) == 1
    (name,) = copies(tmp_path)
    assert name.endswith("-00000.tar")


def test_empty_and_unannounced_bodies(server: MisbehavingServer, storage: Storage) -> None:
    def unannounced(handler: Any) -> None:
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT)
        handler.close_connection = True

    assert content_of(storage, server.url("/empty", whole(b""))) == b""
    assert content_of(storage, server.url("/unannounced", unannounced)) == CONTENT


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_passing_errors_are_tried_again(
    server: MisbehavingServer, storage: Storage, code: int
) -> None:
    url = server.url("/0.tar", status(code), status(code), whole(CONTENT))
    assert content_of(storage, url) == CONTENT
    assert len(server.requests["/0.tar"]) == 3


def test_tries_without_progress_are_limited_and_named(
    server: MisbehavingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url("/0.tar", status(503))
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError) as caught:
        make_storage(tmp_path, max_tries=9).open(url)
    assert str(caught.value) == (
        f"{url} cannot be fetched: 9 tries brought no progress, the last: HTTP status 503"
    )
    assert len(server.requests["/0.tar"]) == 9
    assert len(caplog.records) == 4  # retries 1, 2, 4, 8
    assert copies(tmp_path) == []


def test_retry_after_is_heeded_within_the_largest_pause(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    began = time.monotonic()
    content_of(storage, server.url("/0.tar", status(503, Retry_After=60), whole(CONTENT)))
    assert 0.1 <= time.monotonic() - began < 20


def test_cut_body_goes_on_where_it_broke(server: MisbehavingServer, storage: Storage) -> None:
    # More cuts than tries: each brings bytes.
    cut = whole(CONTENT, send=500_000)
    url = server.url("/0.tar", cut, cut, cut, cut, cut, whole(CONTENT))
    assert content_of(storage, url) == CONTENT
    requests = server.requests["/0.tar"]
    starts = [request.start or 0 for request in requests]
    assert starts[0] == 0
    # What comes together with the end of the connection may be lost.
    assert all(0 <= end - start <= 500_000 for start, end in itertools.pairwise(starts))
    assert len(starts) == 6
    assert {request.if_range for request in requests[1:]} == {'"1"'}


def test_stalled_body_is_given_up_and_gone_on_with(
    server: MisbehavingServer, storage: Storage
) -> None:
    url = server.url("/0.tar", whole(CONTENT, send=HALF, wait=60), whole(CONTENT))
    began = time.monotonic()
    assert content_of(storage, url) == CONTENT
    assert time.monotonic() - began < 20
    assert [request.start for request in server.requests["/0.tar"]] == [None, HALF]


def test_servers_that_ignore_range_start_again(server: MisbehavingServer, storage: Storage) -> None:
    url = server.url("/0.tar", whole(CONTENT, send=HALF), whole(CONTENT, ranges=False))
    assert content_of(storage, url) == CONTENT
    # No progress is endless: half of it comes each time, and never more. (What comes together with
    # the end of a connection may be lost: one of the next three tries may still bring a little.)
    url = server.url("/1.tar", whole(CONTENT, send=HALF, ranges=False))
    with pytest.raises(RemoteError, match="3 tries brought no progress"):
        storage.open(url)
    assert 4 <= len(server.requests["/1.tar"]) <= 1 + 3 + 3


@pytest.mark.parametrize("if_range", [True, False])
def test_changed_content_is_never_spliced(
    server: MisbehavingServer, storage: Storage, if_range: bool
) -> None:
    changed = whole(OTHER, etag='"2"', if_range=if_range)
    url = server.url("/0.tar", whole(CONTENT, send=HALF), changed)
    assert content_of(storage, url) == OTHER
    shorter = whole(OTHER[:1000], etag='"2"', if_range=if_range)
    url = server.url("/1.tar", whole(CONTENT, send=HALF), shorter)
    assert content_of(storage, url) == OTHER[:1000]


def test_content_without_a_version_is_fetched_from_the_start(
    server: MisbehavingServer, storage: Storage
) -> None:
    url = server.url(
        "/0.tar", whole(CONTENT, etag=None, send=HALF), whole(OTHER, etag=None, send=None)
    )
    assert content_of(storage, url) == OTHER
    assert [request.start for request in server.requests["/0.tar"]] == [None, None]


def test_missing_files(server: MisbehavingServer, storage: Storage, tmp_path: Path) -> None:
    for url in (server.url("/0.tar", status(404)), str(tmp_path / "none.tar")):
        for ask in (storage.open, storage.head):
            with pytest.raises(FileNotFoundError):
                ask(url)
        assert storage.read(url) is None
        assert not storage.exists(url)
    assert len(server.requests["/0.tar"]) == 4
    assert copies(tmp_path) == []
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["shard-cache.lock"]


@pytest.mark.parametrize("code", [401, 403])
def test_refused_credentials_are_named_at_once(
    server: MisbehavingServer, storage: Storage, code: int
) -> None:
    url = server.url("/0.tar", status(code))
    for ask in (storage.open, storage.read, storage.exists):
        with pytest.raises(RemoteError, match=rf"credentials are absent or refused .*{code}"):
            ask(url)
    assert len(server.requests["/0.tar"]) == 3
    # Buckets that do not let us list, and CDNs, answer so for side files that are not there.
    assert storage.read(url, refused_is_absent=True) is None


def test_credentials_that_a_proxy_refuses_are_no_absent_file(
    server: MisbehavingServer, storage: Storage
) -> None:
    with pytest.raises(RemoteError, match=r"credentials are absent or refused .*407"):
        storage.read(server.url("/sizes.json", status(407)), refused_is_absent=True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pw@host:80/a/0.tar?sig=pw#pw", "https://host:80/a/0.tar"),
        ("{http://u:pw@a,https://u:pw@b}/{0..9}.tar", "{http://a,https://b}/{0..9}.tar"),
        ("s3://bucket/a@b/0.tar", "s3://bucket/a@b/0.tar"),
        ("/data/a#1?/user@host/0.tar", "/data/a#1?/user@host/0.tar"),
    ],
)
def test_what_may_be_secret_is_not_shown(url: str, expected: str) -> None:
    assert redact(url) == expected


def test_a_host_that_cannot_be_one_is_named_at_once(storage: Storage) -> None:
    with pytest.raises(RemoteError, match=r"http://a\.\.b/0\.tar cannot be fetched: UnicodeError"):
        storage.open("http://a..b/0.tar")


def test_secrets_of_a_url_are_sent_but_not_shown(
    server: MisbehavingServer, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    path = "/0.tar?X-Amz-Signature=secret"
    url = server.url(path, status(503), status(403)).replace("//", "//user:secret@")
    with caplog.at_level(logging.DEBUG, "ds_linclip"), pytest.raises(RemoteError) as caught:
        storage.open(url)
    assert len(server.requests[path]) == 2
    assert "secret" not in str(caught.value) + caplog.text
    assert "/0.tar" in caplog.text
    assert caught.value.__suppress_context__


def test_unreachable_server_is_tried_then_named(storage: Storage) -> None:
    with pytest.raises(RemoteError, match="3 tries brought no progress, the last: ClientConnector"):
        storage.open("http://127.0.0.1:9/0.tar")


def test_damaged_copy_is_fetched_anew(server: MisbehavingServer, storage: Storage) -> None:
    url = server.url("/0.tar", whole(CONTENT), whole(OTHER, etag='"2"'))
    with storage.open(url) as first:
        assert content_of(storage, url, again=True) == OTHER
        assert os.pread(first.fileno(), 2**30, 0) == CONTENT
    assert content_of(storage, url) == OTHER
    assert len(server.requests["/0.tar"]) == 2


def test_what_is_damaged_at_its_source_is_fetched_anew_once(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    url = server.url("/0.tar", whole(CONTENT))
    content_of(storage, url)
    for process in range(3):
        assert content_of(make_storage(tmp_path), url, again=True) == CONTENT, process
        assert content_of(storage, url) == CONTENT
    assert len(server.requests["/0.tar"]) == 2
    # A copy of another size is none, and what comes in its place is known.
    (copy,) = [p for p in (tmp_path / "cache").iterdir() if p.name.endswith("-0.tar")]
    os.truncate(copy, HALF)
    assert content_of(storage, url) == content_of(storage, url, again=True) == CONTENT
    assert len(server.requests["/0.tar"]) == 3


def test_what_was_damaged_on_its_way_is_not_taken_for_damaged_at_its_source(
    server: MisbehavingServer, storage: Storage
) -> None:
    bodies = [whole(CONTENT[:HALF]), whole(CONTENT), whole(CONTENT), whole(OTHER)]
    url = server.url("/0.tar", *bodies)
    assert content_of(storage, url) == CONTENT[:HALF]
    assert content_of(storage, url, again=True) == CONTENT
    assert content_of(storage, url, again=True) == CONTENT
    assert len(server.requests["/0.tar"]) == 3
    assert content_of(storage, url, again=True) == CONTENT
    assert len(server.requests["/0.tar"]) == 3


def test_side_files_are_read_without_the_cache(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    cut = whole(CONTENT, send=HALF)
    url = server.url("/0_stats.json", status(503), cut, whole(CONTENT))
    assert storage.read(url) == CONTENT
    assert storage.exists(url)
    (tmp_path / "0_stats.json").write_bytes(CONTENT)
    for first in (url, str(tmp_path / "0_stats.json")):
        assert storage.head(first)[:512] == CONTENT[:512]
    for small in (url, str(tmp_path / "0_stats.json")):
        with pytest.raises(ValueError, match=r"0_stats\.json must have at most 100 bytes"):
            storage.read(small, 100)
    assert not (tmp_path / "cache").exists()


def test_local_files_are_opened_in_place(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(CONTENT)
    for url in (str(path), f"file://{path}"):
        assert not is_remote(url)
        assert content_of(storage, url) == content_of(storage, url, again=True) == CONTENT
        assert storage.exists(url)
        assert storage.read(url) == CONTENT
        storage.prefetch([url])
    with pytest.raises(IsADirectoryError):
        storage.open(str(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_remote_files_need_a_folder_for_copies(tmp_path: Path) -> None:
    url = "https://user:pw@example.com/0.tar"
    rule = r"data\.cache\.dir \(None\) must name .* \(first: https://example\.com/0\.tar\)"
    nowhere = Storage(CacheConfig(), NetworkConfig())
    nowhere.check(["/data/0.tar"])
    for ask in (nowhere.open, lambda url: nowhere.check([url]), lambda u: nowhere.prefetch([u])):
        with pytest.raises(ValueError, match=rule):
            ask(url)
    (tmp_path / "file").touch()
    unwritable = Storage(CacheConfig(dir=str(tmp_path / "file" / "cache")), NetworkConfig())
    with pytest.raises(ValueError, match=r"data\.cache\.dir \(.*file/cache\) must be a folder"):
        unwritable.check([url])
    with pytest.raises(CacheError, match=r"data\.cache\.dir"):
        unwritable.open(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:curl https://host/0.tar", r"data\.train \(pipe:curl .*\) must be .* not run"),
        ("s4://bucket/0.tar", r"data\.train \(s4://bucket/0\.tar\) must .* did you mean s3://"),
        ("simplecache::s3://b/0.tar", "not a chain"),
        ("https://user:pw@host/a.zip::zip://b", r"\(https://host/a\.zip::.*not a chain"),
        ("memory://0.tar", "must be a local path or have a scheme"),
        ("gs://bucket/0.tar", r"pip install 'ds_linclip\[gcs\]'"),
        ("abfs://bucket/0.tar", "Install adlfs"),
    ],
)
def test_urls_that_cannot_be_read_are_named(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    ["0.tar", "/a/b::c.tar", "file:///a.tar", "s3://b/{0..9}.tar", "http://[::1]:80/{0..9}.tar"],
)
def test_paths_and_urls_of_stores_pass(url: str) -> None:
    check_url(url)

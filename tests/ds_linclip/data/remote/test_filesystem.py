"""Storage over real HTTP servers: copies, retries, errors, secrets; and local files."""

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
from helpers.misbehaving_server import MisbehavingServer, endless_zeros, status, whole
from helpers.stored_content import CONTENT, HALF, OTHER, cached_files, content_of, make_storage


def test_file_is_fetched_once_and_then_read_from_its_copy(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    url = server.url("/a/00000.tar", whole(CONTENT))
    assert [content_of(storage, url) for _ in range(3)] == [CONTENT] * 3
    assert content_of(pickle.loads(pickle.dumps(storage)), url) == CONTENT
    assert server.num_requests["/a/00000.tar"] == 1
    (copy,) = cached_files(tmp_path)
    assert copy.name.endswith("-00000.tar")


def test_empty_bodies_and_bodies_of_unannounced_size(
    server: MisbehavingServer, storage: Storage
) -> None:
    def unannounced(handler: Any) -> None:
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT)
        handler.close_connection = True

    assert content_of(storage, server.url("/empty", whole(b""))) == b""
    assert content_of(storage, server.url("/unannounced", unannounced)) == CONTENT


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_transient_errors_are_retried(
    server: MisbehavingServer, storage: Storage, code: int
) -> None:
    url = server.url("/0.tar", status(code), status(code), whole(CONTENT))
    assert content_of(storage, url) == CONTENT
    assert server.num_requests["/0.tar"] == 3


def test_tries_are_limited_and_the_last_error_is_named(
    server: MisbehavingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url("/0.tar", status(503))
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError) as caught:
        make_storage(tmp_path, max_tries=5).open(url)
    assert str(caught.value) == (
        f"{url} cannot be fetched: 5 tries failed, the last: HTTP status 503"
    )
    assert server.num_requests["/0.tar"] == 5
    assert len(caplog.records) == 4
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize(("wait", "error"), [(0.0, "ClientPayloadError"), (60.0, "Timeout")])
def test_body_that_is_cut_or_stalls_is_fetched_again_from_the_start(
    server: MisbehavingServer,
    storage: Storage,
    caplog: pytest.LogCaptureFixture,
    wait: float,
    error: str,
) -> None:
    url = server.url("/0.tar", whole(OTHER, send=HALF, wait=wait), whole(CONTENT))
    began = time.monotonic()
    assert content_of(storage, url) == CONTENT
    assert time.monotonic() - began < 20
    assert server.num_requests["/0.tar"] == 2
    assert error in caplog.text


def test_missing_files(server: MisbehavingServer, storage: Storage, tmp_path: Path) -> None:
    for url in (server.url("/0.tar", status(404)), str(tmp_path / "none.tar")):
        for ask in (storage.open, storage.head):
            with pytest.raises(FileNotFoundError):
                ask(url)
        assert storage.read(url) is None
        assert not storage.exists(url)
    assert server.num_requests["/0.tar"] == 4
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("code", [401, 403])
def test_refused_credentials_are_named_at_once(
    server: MisbehavingServer, storage: Storage, code: int
) -> None:
    url = server.url("/0.tar", status(code))
    for ask in (storage.open, storage.read, storage.exists):
        with pytest.raises(RemoteError, match=rf"credentials are absent or refused .*{code}"):
            ask(url)
    assert server.num_requests["/0.tar"] == 3
    # Buckets that do not allow listing, and CDNs, answer so for side files that are not there.
    assert storage.read(url, refused_is_absent=True) is None


def test_credentials_that_a_proxy_refuses_do_not_mean_an_absent_file(
    server: MisbehavingServer, storage: Storage
) -> None:
    with pytest.raises(RemoteError, match=r"credentials are absent or refused .*407"):
        storage.read(server.url("/sizes.json", status(407)), refused_is_absent=True)


def test_unreachable_server_is_named_after_all_tries(storage: Storage) -> None:
    with pytest.raises(RemoteError, match="3 tries failed, the last: ClientConnector"):
        storage.open("http://127.0.0.1:9/0.tar")


def test_impossible_host_is_named_at_once(storage: Storage) -> None:
    with pytest.raises(RemoteError, match=r"http://a\.\.b/0\.tar cannot be fetched: Unicode"):
        storage.open("http://a..b/0.tar")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pw@host:80/a/0.tar?sig=pw#pw", "https://host:80/a/0.tar"),
        ("{http://u:pw@a,https://u:pw@b}/{0..9}.tar", "{http://a,https://b}/{0..9}.tar"),
        ("s3://bucket/a@b/0.tar", "s3://bucket/a@b/0.tar"),
        ("/data/a#1?/user@host/0.tar", "/data/a#1?/user@host/0.tar"),
    ],
)
def test_redacted_urls(url: str, expected: str) -> None:
    assert redact(url) == expected


def test_secrets_of_a_url_are_sent_but_not_shown(
    server: MisbehavingServer, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    path = "/0.tar?X-Amz-Signature=secret"
    url = server.url(path, status(503), status(403)).replace("//", "//user:secret@")
    with caplog.at_level(logging.DEBUG, "ds_linclip"), pytest.raises(RemoteError) as caught:
        storage.open(url)
    assert server.num_requests[path] == 2
    assert "secret" not in str(caught.value) + caplog.text
    assert "/0.tar" in caplog.text
    assert caught.value.__suppress_context__


def test_damaged_copy_is_fetched_once_more_by_all_processes_together(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    url = server.url("/0.tar", whole(CONTENT), whole(OTHER))
    with storage.open(url) as first:
        for number in range(3):
            assert content_of(make_storage(tmp_path), url, refetch=True) == OTHER, number
            assert content_of(storage, url) == OTHER
        assert os.pread(first.fileno(), 2**30, 0) == CONTENT
    assert server.num_requests["/0.tar"] == 2


def test_a_copy_that_was_evicted_may_be_fetched_once_more_again(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=4)
    first, second = (server.url(f"/{i}.tar", whole(CONTENT)) for i in range(2))
    content_of(storage, first, refetch=True)
    content_of(storage, second)  # evicts the first
    content_of(storage, first)
    content_of(storage, first, refetch=True)
    assert server.num_requests["/0.tar"] == 3


def test_side_files_are_read_without_the_cache(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    cut = whole(CONTENT, send=HALF)
    url = server.url("/0_stats.json", status(503), cut, whole(CONTENT))
    assert storage.read(url) == CONTENT
    assert storage.exists(url)
    (tmp_path / "0_stats.json").write_bytes(CONTENT)
    for each in (url, str(tmp_path / "0_stats.json")):
        assert storage.head(each) == CONTENT[:512]
        with pytest.raises(ValueError, match=r"0_stats\.json must have at most 100 bytes"):
            storage.read(each, 100)
    assert not (tmp_path / "cache").exists()


def test_checking_a_large_file_does_not_read_it(
    server: MisbehavingServer, storage: Storage
) -> None:
    url = server.url("/0.tar", endless_zeros(2**40))
    assert storage.exists(url)
    assert storage.head(url) == bytes(512)


def test_local_files_are_opened_in_place(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(CONTENT)
    for url in (str(path), f"file://{path}"):
        assert not is_remote(url)
        assert content_of(storage, url) == content_of(storage, url, refetch=True) == CONTENT
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
def test_urls_that_cannot_be_read_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    ["0.tar", "/a/b::c.tar", "file:///a.tar", "s3://b/{0..9}.tar", "http://[::1]:80/{0..9}.tar"],
)
def test_paths_and_urls_that_can_be_read_pass(url: str) -> None:
    check_url(url)

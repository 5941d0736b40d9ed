"""Remote shards over real servers: what breaks goes on, what is wrong is named, secrets stay."""

import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from misbehaving_server import FtpServer, MisbehavingServer, endless_zeros, status, whole
from moto.server import ThreadedMotoServer

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.storage import (
    CacheError,
    RemoteError,
    Storage,
    check_url,
    is_remote,
    shown,
)

CONTENT = os.urandom(3_000_000)
OTHER = os.urandom(3_000_000)
HALF = 1_500_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with MisbehavingServer() as running:
        yield running
        running.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return make_storage(tmp_path)


def make_storage(folder: Path, **network: Any) -> Storage:
    settings = {"connect_timeout": 5.0, "read_timeout": 1.0, "max_tries": 3, "backoff": 0.01}
    return Storage(
        CacheConfig(dir=str(folder / "cache"), max_gib=0.5),
        NetworkConfig(**(settings | {"max_backoff": 0.1} | network)),
    )


def content_of(storage: Storage, url: str, *, again: bool = False) -> bytes:
    with storage.open_again(url) if again else storage.open(url) as file:
        return os.pread(file.fileno(), 2**30, 0)


def copies(folder: Path) -> list[str]:
    """Files in the cache, less the locks."""
    return sorted(p.name for p in (folder / "cache").iterdir() if not p.name.endswith(".lock"))


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
        with pytest.raises(FileNotFoundError):
            storage.open(url)
        assert storage.read(url) is None
        assert not storage.exists(url)
    assert len(server.requests["/0.tar"]) == 3
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
    assert shown(url) == expected


@pytest.fixture
def ftp_server() -> Iterator[Callable[..., FtpServer]]:
    running = []

    def start(*script: Any) -> FtpServer:
        running.append(FtpServer(CONTENT, *script))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_what_other_libraries_raise_is_tried_again(
    storage: Storage, ftp_server: Callable[..., FtpServer]
) -> None:
    # Neither is an OSError: ftplib.error_temp, and EOFError on a connection that is dead.
    busy, ready = "421 too many users", "220 ready"
    server = ftp_server((busy, None), (ready, HALF), (ready, None))
    assert content_of(storage, server.url) == CONTENT
    assert server.num_connections == 3
    assert storage.exists(server.url)
    assert storage.read(server.url.replace("0.tar", "sizes.json")) is None


@pytest.mark.parametrize(
    ("greeting", "message", "num_tries"),
    [
        ("421 too many users", "3 tries brought no progress, the last: error_temp: 421", 3),
        ("530 no anonymous users", "cannot be fetched: error_perm: 530 no anonymous", 1),
    ],
)
def test_what_other_libraries_raise_is_named(
    storage: Storage,
    ftp_server: Callable[..., FtpServer],
    greeting: str,
    message: str,
    num_tries: int,
) -> None:
    server = ftp_server((greeting, None))
    for ask in (storage.open, storage.exists, storage.read):
        with pytest.raises(RemoteError, match=message):
            ask(server.url)
    assert server.num_connections == 3 * num_tries


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


def test_prefetched_files_are_there_before_they_are_asked_for(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    urls = [server.url(f"/{i}.tar", whole(CONTENT, seconds=0.2)) for i in range(6)]
    storage.check(urls)  # makes the folder
    storage.prefetch([*urls, *urls, server.url("/none.tar", status(404))])
    wait_for(lambda: len(copies(tmp_path)) == 6 and "partial" not in "".join(copies(tmp_path)))
    wait_for(lambda: len(server.requests["/none.tar"]) == 1)
    assert [content_of(storage, url) for url in urls] == [CONTENT] * 6
    assert [len(server.requests[f"/{i}.tar"]) for i in range(6)] == [1] * 6
    with pytest.raises(FileNotFoundError):
        storage.open(server.url("/none.tar", status(404)))


def test_prefetching_outlives_what_it_did_not_expect(
    server: MisbehavingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(tmp_path, downloads=1)
    url = server.url("/0.tar", whole(CONTENT))
    with caplog.at_level(logging.WARNING):
        # What no name can be made of: a half of a pair that no encoding knows.
        storage.prefetch([*(f"http://u:secret@host/{i}\udc80.tar" for i in range(3)), url])
        wait_for(lambda: len(copies(tmp_path)) == 1 if (tmp_path / "cache").exists() else False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not fetched ahead: UnicodeEncodeError" in caplog.text
    assert "secret" not in caplog.text


def test_prefetching_tries_once(server: MisbehavingServer, tmp_path: Path) -> None:
    storage = make_storage(tmp_path)
    urls = [server.url("/0.tar", status(503)), server.url("/1.tar", whole(CONTENT))]
    storage.check(urls)
    storage.prefetch(urls)
    wait_for(lambda: len(copies(tmp_path)) == 1)
    wait_for(lambda: len(server.requests["/0.tar"]) == 1)
    time.sleep(0.3)  # longer than all pauses
    assert len(server.requests["/0.tar"]) == 1
    assert content_of(storage, server.url("/0.tar", status(503), whole(CONTENT))) == CONTENT


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def prefetch_and_open(storage: Storage, urls: list[str], results: "queue.Queue[bytes]") -> None:
    storage.prefetch(urls)
    for url in urls:
        results.put(content_of(storage, url))


def test_used_before_and_after_a_fork(server: MisbehavingServer, storage: Storage) -> None:
    urls = [server.url(f"/{i}.tar", whole(CONTENT)) for i in range(4)]
    # An idle connection and an open copy are in the parent when it forks.
    side = server.url("/sizes.json", whole(b"{}"))
    assert storage.read(side) == b"{}"
    held = storage.open(urls[0])
    storage.prefetch(urls[:1])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=prefetch_and_open, args=(storage, urls, results))
    child.start()
    assert [results.get(timeout=30) for _ in urls] == [CONTENT] * 4
    child.join(timeout=30)
    assert child.exitcode == 0
    began = time.monotonic()
    assert storage.read(side) == b"{}"
    assert time.monotonic() - began < 0.9  # the connection was not lost to the child
    held.close()
    assert [len(server.requests[f"/{i}.tar"]) for i in range(4)] == [1] * 4


def measure_fetch(storage: Storage, small: str, large: str, results: "queue.Queue[int]") -> None:
    storage.open(small).close()  # libraries are loaded, buffers are there
    before = resident_peak()
    storage.open(large).close()
    results.put(resident_peak() - before)


def resident_peak() -> int:
    """Bytes; the kernel's high-water mark of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_memory_does_not_grow_with_the_file(server: MisbehavingServer, storage: Storage) -> None:
    small = server.url("/small.tar", whole(CONTENT))
    large = server.url("/large.tar", endless_zeros(200 * 2**20))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=measure_fetch, args=(storage, small, large, results))
    child.start()
    assert results.get(timeout=60) < 64e6
    child.join(timeout=30)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    client.put_object(Bucket="shards", Key="a/00000.tar", Body=CONTENT)
    client.put_object(Bucket="shards", Key="a/00000_stats.json", Body=b"{}")
    return "s3://shards"


def test_s3_files_are_opened_and_read(bucket: str, storage: Storage) -> None:
    check_url(f"{bucket}/a/00000.tar")
    assert content_of(storage, f"{bucket}/a/00000.tar") == CONTENT
    assert content_of(storage, f"{bucket}/a/00000.tar", again=True) == CONTENT
    assert storage.read(f"{bucket}/a/00000_stats.json") == b"{}"
    assert storage.exists(f"{bucket}/a/00000.tar")


@pytest.mark.parametrize("path", ["a/00001.tar", "a"])
def test_missing_s3_keys(bucket: str, storage: Storage, path: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.open(f"{bucket}/{path}")
    with pytest.raises(FileNotFoundError):
        storage.open("s3://no-such-bucket/0.tar")
    assert storage.read(f"{bucket}/{path}") is None
    assert not storage.exists(f"{bucket}/{path}")


def open_in_child(storage: Storage, url: str, results: "queue.Queue[str]") -> None:
    try:
        results.put(str(len(content_of(storage, url))))
    except OSError as error:
        results.put(f"{type(error).__name__}: {error}")


def read_in_child(storage: Storage, url: str, results: "queue.Queue[str]") -> None:
    results.put(str(storage.read(url, refused_is_absent=True)))


def content_in_child(storage: Storage, url: str, ask: Any = open_in_child) -> str:
    """Length of the content or the error, from a process that has no S3 client yet."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=ask, args=(storage, url, results))
    child.start()
    answer = results.get(timeout=60)
    child.join(timeout=30)
    return str(answer)


def test_absent_s3_credentials_are_named(
    bucket: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    message = content_in_child(storage, f"{bucket}/a/00000.tar")
    assert "RemoteError: s3://shards/a/00000.tar: credentials are absent or refused" in message


def test_s3_body_goes_on_where_a_killed_process_left_it(
    bucket: str, storage: Storage, tmp_path: Path
) -> None:
    url = f"{bucket}/a/00000.tar"
    content_of(storage, url)
    (copy,) = [p for p in (tmp_path / "cache").iterdir() if p.name.endswith("-00000.tar")]
    # What a kill in the middle leaves; its first bytes are changed to tell whether they are kept.
    content = bytes(1000) + CONTENT[1000:]
    copy.with_name(copy.name + ".partial").write_bytes(content[:HALF])
    copy.unlink()
    assert content_of(storage, url) == content
    boto3.client("s3").put_object(Bucket="shards", Key="a/00000.tar", Body=OTHER)
    copy.with_name(copy.name + ".partial").write_bytes(content[:HALF])
    copy.unlink()
    assert content_of(storage, url) == OTHER


@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_s3_bodies_that_break_or_stall_go_on(
    bucket: str,
    server: MisbehavingServer,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    wait: float,
) -> None:
    content = os.urandom(12_000_000)
    broken = whole(content, send=HALF, wait=wait)
    # In turn what HEAD and GET are answered.
    script = (status(503), whole(content), broken, whole(content))
    endpoint = server.url("/shards/0.tar", *script).removesuffix("/shards/0.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    began = time.monotonic()
    assert content_in_child(storage, f"{bucket}/0.tar") == str(len(content))
    assert content_of(storage, f"{bucket}/0.tar") == content
    assert time.monotonic() - began < 30
    assert len(server.requests["/shards/0.tar"]) < 10


def test_refused_s3_credentials_are_named_at_once(
    bucket: str, server: MisbehavingServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = server.url("/shards/0.tar", status(403)).removesuffix("/shards/0.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    message = content_in_child(storage, f"{bucket}/0.tar")
    assert "RefusedError: s3://shards/0.tar: credentials are absent or refused" in message
    assert content_in_child(storage, f"{bucket}/0.tar", read_in_child) == "None"
    assert len(server.requests["/shards/0.tar"]) == 2

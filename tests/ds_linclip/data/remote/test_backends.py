"""Shards in S3 and behind FTP: failures are retried, permanent errors are named."""

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ds_linclip.data.remote import Storage, check_url
from ds_linclip.data.remote.backends import RemoteError
from helpers.misbehaving_server import FtpServer, MisbehavingServer, status, whole
from helpers.stored_content import CONTENT, HALF, content_of


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


def test_errors_of_other_libraries_are_retried(
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
        ("421 too many users", "3 tries failed, the last: error_temp: 421", 3),
        ("530 no anonymous users", "cannot be fetched: error_perm: 530 no anonymous", 1),
    ],
)
def test_errors_of_other_libraries_are_named(
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
    assert content_of(storage, f"{bucket}/a/00000.tar", refetch=True) == CONTENT
    assert storage.read(f"{bucket}/a/00000_stats.json") == b"{}"
    assert storage.exists(f"{bucket}/a/00000.tar")
    assert storage.head(f"{bucket}/a/00000.tar") == CONTENT[:512]


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
    """Return what a process without an S3 client reports: the content's length, or the error."""
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


@pytest.mark.long
@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_s3_bodies_that_break_or_stall_are_retried(
    bucket: str,
    server: MisbehavingServer,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    wait: float,
) -> None:
    content = os.urandom(12_000_000)
    broken = whole(content, send=HALF, wait=wait)
    # The answers to HEAD and GET in turn.
    script = (status(503), whole(content), broken, whole(content))
    endpoint = server.url("/shards/0.tar", *script).removesuffix("/shards/0.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    began = time.monotonic()
    assert content_in_child(storage, f"{bucket}/0.tar") == str(len(content))
    assert content_of(storage, f"{bucket}/0.tar") == content
    assert time.monotonic() - began < 30
    assert server.num_requests["/shards/0.tar"] < 10


@pytest.mark.long
def test_refused_s3_credentials_are_named_at_once(
    bucket: str, server: MisbehavingServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = server.url("/shards/0.tar", status(403)).removesuffix("/shards/0.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    message = content_in_child(storage, f"{bucket}/0.tar")
    assert "RefusedError: s3://shards/0.tar: credentials are absent or refused" in message
    assert content_in_child(storage, f"{bucket}/0.tar", read_in_child) == "None"
    assert server.num_requests["/shards/0.tar"] == 2

"""Remote shards fetched ahead, after a fork, and in little memory."""

import logging
import multiprocessing
import queue
import time
from pathlib import Path

import pytest

from ds_linclip.data.remote import Storage
from helpers.misbehaving_server import MisbehavingServer, endless_zeros, status, whole
from helpers.stored_content import CONTENT, cached_files, content_of, make_storage, wait_for


def test_prefetched_files_are_there_before_they_are_opened(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    urls = [server.url(f"/{i}.tar", whole(CONTENT, seconds=0.2)) for i in range(6)]
    missing = server.url("/none.tar", status(404))
    storage.prefetch([*urls, *urls, missing])
    wait_for(lambda: [path.suffix for path in cached_files(tmp_path)] == [".tar"] * 6)
    wait_for(lambda: server.num_requests["/none.tar"] == 1)
    assert [content_of(storage, url) for url in urls] == [CONTENT] * 6
    assert [server.num_requests[f"/{i}.tar"] for i in range(6)] == [1] * 6
    with pytest.raises(FileNotFoundError):
        storage.open(missing)


def test_prefetching_survives_unexpected_errors(
    server: MisbehavingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(tmp_path, downloads=1)
    url = server.url("/0.tar", whole(CONTENT))
    with caplog.at_level(logging.WARNING):
        # Half of a surrogate pair, which has no encoding.
        storage.prefetch(["http://u:secret@host/0\udc80.tar", url])
        wait_for(lambda: [path.suffix for path in cached_files(tmp_path)] == [".tar"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not prefetched: UnicodeEncodeError" in caplog.text
    assert "secret" not in caplog.text


def test_prefetching_tries_once(
    server: MisbehavingServer, storage: Storage, tmp_path: Path
) -> None:
    urls = [server.url("/0.tar", status(503)), server.url("/1.tar", whole(CONTENT))]
    storage.prefetch(urls)
    wait_for(lambda: [path.suffix for path in cached_files(tmp_path)] == [".tar"])
    time.sleep(0.3)  # longer than all pauses
    assert server.num_requests["/0.tar"] == 1
    assert content_of(storage, server.url("/0.tar", status(503), whole(CONTENT))) == CONTENT


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
    assert time.monotonic() - began < 4.5  # the connection was not lost to the child
    held.close()
    assert [server.num_requests[f"/{i}.tar"] for i in range(4)] == [1] * 4


def measure_fetch(storage: Storage, small: str, large: str, results: "queue.Queue[int]") -> None:
    storage.open(small).close()  # loads libraries and allocates buffers
    before = resident_peak()
    storage.open(large).close()
    results.put(resident_peak() - before)


def resident_peak() -> int:
    """Return the kernel's high-water mark of this process in bytes."""
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

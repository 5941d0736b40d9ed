"""Several processes share one cache: one fetches, open copies stay, the size is bounded."""

import errno
import hashlib
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ds_linclip.data.remote import Storage
from ds_linclip.data.remote.backends import RemoteError
from ds_linclip.data.remote.cache import CacheError, DiskCache
from helpers.misbehaving_server import MisbehavingServer, delayed, status, whole
from helpers.stored_content import MB, cached_files, content_of, make_storage, wait_for

FORK = multiprocessing.get_context("fork")


def content_of_size(number: int, size: int = MB) -> bytes:
    return random.Random(number).randbytes(size)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def total_size(folder: Path) -> int:
    """Return the size of the cache as a user sees it; a file may vanish meanwhile."""
    total = 0
    for path in (folder / "cache").iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def start_all(target: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    processes = [FORK.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    return processes


def open_and_report(storage: Storage, url: str, start: Any, results: Any) -> None:
    start.wait()
    try:
        results.put(digest(content_of(storage, url)))
    except OSError as error:
        results.put(f"{type(error).__name__}: {error}")


def test_processes_and_threads_that_open_a_file_at_once_share_one_download(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    content = content_of_size(0, 3 * MB)
    url = server.url("/0.tar", whole(content, seconds=0.5))
    storage = make_storage(tmp_path)
    start, results = FORK.Event(), FORK.SimpleQueue()
    readers = start_all(
        open_and_report, *[(make_storage(tmp_path), url, start, results) for _ in range(4)]
    )
    for _ in range(3):
        arguments = (storage, url, start, results)
        readers.append(threading.Thread(target=open_and_report, args=arguments))
        readers[-1].start()
    start.set()
    assert [results.get() for _ in readers] == [digest(content)] * 7
    for reader in readers:
        reader.join(timeout=30)
    assert server.num_requests["/0.tar"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "message"),
    [(404, "RemoteNotFoundError: .*/0.tar"), (503, "RemoteError: .*/0.tar .* HTTP status 503")],
)
def test_processes_that_wait_for_a_file_then_try_themselves(
    server: MisbehavingServer, tmp_path: Path, code: int, message: str
) -> None:
    url = server.url("/0.tar", delayed(status(code), 0.3))
    start, results = FORK.Barrier(3), FORK.SimpleQueue()
    storage = make_storage(tmp_path, max_tries=1)
    readers = start_all(open_and_report, *[(storage, url, start, results)] * 3)
    for _ in readers:
        assert re.match(message, results.get())
    for reader in readers:
        reader.join(timeout=30)
    assert server.num_requests["/0.tar"] == 3
    content = content_of_size(0)
    assert content_of(storage, server.url("/0.tar", whole(content))) == content


def test_equal_names_of_different_urls_do_not_collide(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path)
    paths = ("/a/00000.tar", "/b/00000.tar", "/a/00000.tar?version=2")
    urls = [server.url(path, whole(content_of_size(i))) for i, path in enumerate(paths)]
    for _ in range(2):
        assert [content_of(storage, url) for url in urls] == [content_of_size(i) for i in range(3)]
    assert len(cached_files(tmp_path)) == 3


def test_killed_download_leaves_neither_a_lock_nor_a_copy_and_makes_room(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    content = content_of_size(0, 8 * MB)
    url = server.url("/0.tar", whole(content, seconds=15), whole(content))
    storage = make_storage(tmp_path, megabytes=9)
    (victim,) = start_all(Storage.open, (storage, url))
    wait_for(lambda: [path for path in cached_files(tmp_path) if path.stat().st_size == 8 * MB])
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    (partial,) = cached_files(tmp_path)
    assert partial.suffix == ".tmp"
    began = time.monotonic()
    assert content_of(make_storage(tmp_path, megabytes=9), url) == content
    assert time.monotonic() - began < 10
    assert not partial.exists()  # 9 MB have no room for both
    assert len(cached_files(tmp_path)) == 1


def test_least_recently_used_copies_are_evicted_first(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=3.1)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(5)]
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        storage.open(urls[number]).close()
    with storage.open(urls[2]), storage.open(urls[0]):
        storage.open(urls[4]).close()  # in place of 3
    for number in (0, 2, 4, 1):
        storage.open(urls[number]).close()
    assert [server.num_requests[f"/{i}.tar"] for i in range(5)] == [1, 2, 1, 1, 1]


def test_lack_of_room_beside_open_copies_is_named(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=2.5)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(3)]
    with storage.open(urls[0]) as first, storage.open(urls[1]) as second:
        storage.prefetch(urls[2:])  # silent
        rule = r"data\.cache\.max_gib \(0\.0023.*\) must be at least .* 0\.002 GiB are, .*/2\.tar"
        with pytest.raises(CacheError, match=rule):
            storage.open(urls[2])
        assert os.pread(first.fileno(), 2**30, 0) == content_of_size(0)
        assert os.pread(second.fileno(), 2**30, 0) == content_of_size(1)
    storage.open(urls[2]).close()
    large = server.url("/large.tar", whole(content_of_size(3, 3 * MB)))
    with pytest.raises(CacheError, match=r"data\.cache\.max_gib"):
        storage.open(large)
    assert total_size(tmp_path) < 2.5 * MB


def test_room_of_a_running_download_is_waited_for(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=2.5)
    slow = server.url("/slow.tar", whole(content_of_size(0, 2 * MB), seconds=4))
    fast = server.url("/fast.tar", whole(content_of_size(1)))
    storage.prefetch([slow])
    wait_for(lambda: cached_files(tmp_path))
    assert total_size(tmp_path) == 2 * MB  # all that it will take
    assert content_of(storage, fast) == content_of_size(1)


def test_foreign_files_stay(server: MisbehavingServer, tmp_path: Path) -> None:
    storage = make_storage(tmp_path, megabytes=1.5)
    (tmp_path / "cache" / "folder").mkdir(parents=True)
    foreign = ["notes.txt", "00000.tar", ".00000.tar.tmp"]
    for name in foreign:
        (tmp_path / "cache" / name).write_bytes(bytes(2 * MB))
    for number in range(3):
        storage.open(server.url(f"/{number}.tar", whole(content_of_size(number)))).close()
    names = {path.name for path in cached_files(tmp_path)}
    assert {*foreign, "folder"} <= names
    assert len(names) == 5  # one copy


def close_and_wait(file: Any, done: Any) -> None:
    file.close()
    done.wait()


def test_copy_open_here_survives_that_a_forked_process_closes_it(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=1.5)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(2)]
    done = FORK.Event()
    with storage.open(urls[0]) as file:
        (child,) = start_all(close_and_wait, (file, done))
        time.sleep(0.2)
        with pytest.raises(CacheError, match=r"data\.cache\.max_gib"):
            storage.open(urls[1])
    storage.open(urls[1]).close()
    done.set()
    child.join(timeout=30)


def test_copy_appears_only_while_nobody_counts_the_files(tmp_path: Path) -> None:
    written, counting = threading.Event(), threading.Event()

    def blocks() -> Iterator[bytes]:
        yield bytes(MB)
        written.set()
        counting.wait()

    cache = DiskCache(str(tmp_path / "cache"), 0.5)
    arguments = ("http://host/0.tar", MB, blocks())
    writer = threading.Thread(target=lambda: cache.store(*arguments).close())
    writer.start()
    written.wait()
    with FileLock(tmp_path / "cache" / "shard-cache.lock"):
        counting.set()
        time.sleep(0.3)
        assert [path.suffix for path in cached_files(tmp_path)] == [".tmp"]
    writer.join(timeout=30)
    assert [path.suffix for path in cached_files(tmp_path)] == [".tar"]


def test_full_disk_is_named(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield bytes(MB)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = DiskCache(str(tmp_path / "cache"), 0.5)
    with (
        cache.locked("http://host/0.tar"),
        pytest.raises(CacheError, match=r"data\.cache\.max_gib \(0\.5\) .* disk .*, which is full"),
    ):
        cache.store("http://host/0.tar", None, blocks())
    assert cached_files(tmp_path) == []


def open_with_small_files(storage: Storage, url: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, MB // 2))
    try:
        storage.open(url)
    except CacheError as error:
        results.put(str(error))


def test_disk_errors_are_named_and_not_retried(server: MisbehavingServer, tmp_path: Path) -> None:
    url = server.url("/0.tar", whole(content_of_size(0, 3 * MB)))
    results = FORK.SimpleQueue()
    (child,) = start_all(open_with_small_files, (make_storage(tmp_path), url, results))
    child.join(timeout=30)
    assert results.get().startswith(f"data.cache.dir ({tmp_path}/cache) must be a folder on")
    assert server.num_requests["/0.tar"] == 1
    assert cached_files(tmp_path) == []


def test_failed_downloads_leave_nothing(server: MisbehavingServer, tmp_path: Path) -> None:
    url = server.url("/0.tar", whole(content_of_size(0), send=MB // 2))
    with pytest.raises(RemoteError):
        make_storage(tmp_path).open(url)
    assert cached_files(tmp_path) == []


def cycle(storage: Storage, urls: list[str], digests: list[str], seed: int, results: Any) -> None:
    """Open random files, two at a time, and count those with wrong content."""
    order = random.Random(seed)
    held: list[tuple[int, Any]] = []
    wrong = 0
    for step in range(40):
        number = order.randrange(len(urls))
        storage.prefetch([urls[order.randrange(len(urls))]])
        held.append((number, storage.open(urls[number])))
        if len(held) > 1 or step == 39:
            index, file = held.pop(0)
            wrong += digest(os.pread(file.fileno(), 2**30, 0)) != digests[index]
            file.close()
    results.put(wrong)


def test_size_is_bounded_while_processes_cycle_through_more_than_fits(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    contents = [content_of_size(i, MB // 2 + 100_000 * i) for i in range(12)]  # 12.6 MB
    urls = [server.url(f"/{i}.tar", whole(content)) for i, content in enumerate(contents)]
    limit = 11 * MB  # three processes, each with two open and two on their way
    storage = make_storage(tmp_path, megabytes=11, read_timeout=5)
    results = FORK.SimpleQueue()
    digests = list(map(digest, contents))
    processes = start_all(cycle, *[(storage, urls, digests, seed, results) for seed in range(3)])
    largest = 0
    while any(process.is_alive() for process in processes):
        if (tmp_path / "cache").exists():
            largest = max(largest, total_size(tmp_path))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [results.get() for _ in processes] == [0, 0, 0]
    assert 5 * MB < largest <= limit
    assert sum(server.num_requests.values()) > 12  # some had to go

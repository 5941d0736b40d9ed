"""Several processes on one folder: one fetches, what is open stays, the size holds, kills heal."""

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote.cache import CacheError
from ds_linclip.data.remote import Storage
from ds_linclip.data.remote.backends import RemoteError
from helpers.misbehaving_server import Answer, Handler, MisbehavingServer, status, whole

MB = 1_000_000
FORK = multiprocessing.get_context("fork")


def make_storage(folder: Path, megabytes: float = 500) -> Storage:
    return Storage(
        CacheConfig(dir=str(folder / "cache"), max_gib=megabytes * MB / 2**30),
        NetworkConfig(read_timeout=5, max_tries=3, backoff=0.01, max_backoff=0.1, downloads=2),
    )


def content_of_size(number: int, size: int = MB) -> bytes:
    return random.Random(number).randbytes(size)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_all(file: Any) -> bytes:
    return os.pread(file.fileno(), 2**30, 0)


def files(folder: Path, end: str = "") -> list[Path]:
    """Copies and partial files, or those whose name has this end."""
    found = [path for path in (folder / "cache").iterdir() if path.name.endswith(end)]
    return [path for path in found if end or path.suffix != ".lock"]


def total_size(folder: Path) -> int:
    """As a user sees it; a file may go while it is looked at."""
    total = 0
    for path in (folder / "cache").iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def open_and_report(storage: Storage, url: str, start: Any, results: Any) -> None:
    start.wait()
    with storage.open(url) as file:
        results.put(digest(read_all(file)))


def test_processes_and_threads_that_ask_at_once_share_one_transfer(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    content = content_of_size(0, 3 * MB)
    url = server.url("/0.tar", whole(content, seconds=0.5))
    storage = make_storage(tmp_path)
    start, results = FORK.Event(), FORK.SimpleQueue()
    askers: list[Any] = [
        FORK.Process(target=open_and_report, args=(make_storage(tmp_path), url, start, results))
        for _ in range(4)
    ]
    askers += [
        threading.Thread(target=open_and_report, args=(storage, url, start, results))
        for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    start.set()
    assert [results.get() for _ in askers] == [digest(content)] * 7
    for asker in askers:
        asker.join(timeout=30)
    assert len(server.requests["/0.tar"]) == 1


def slow(code: int) -> Answer:
    def answer(handler: Handler) -> None:
        time.sleep(0.5)  # meanwhile the others come to wait
        handler.head(code, Content_Length=0)

    return answer


def open_and_report_error(
    storage: Storage, url: str, ahead: bool, start: Any, results: Any
) -> None:
    start.wait()
    if ahead:
        storage.prefetch([url])
    try:
        storage.open(url)
    except OSError as error:
        results.put((type(error).__name__, str(error)))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("code", "kind", "num_tries"), [(503, "RemoteError", 3), (404, "FileNotFoundError", 1)]
)
def test_those_who_wait_for_a_file_share_its_failure(
    server: MisbehavingServer, tmp_path: Path, code: int, kind: str, num_tries: int, ahead: bool
) -> None:
    url = server.url("/0.tar", slow(code))
    storage = make_storage(tmp_path)
    storage.check([url])
    start, results = FORK.Barrier(6), FORK.SimpleQueue()
    askers = [
        FORK.Process(target=open_and_report_error, args=(storage, url, ahead, start, results))
        for _ in range(6)
    ]
    for asker in askers:
        asker.start()
    errors = [results.get() for _ in askers]
    for asker in askers:
        asker.join(timeout=30)
    assert set(errors) == {(kind, errors[0][1])}
    assert "/0.tar" in errors[0][1]
    # One of them tries for all; who looks ahead does it once, unless another one is at it.
    assert num_tries <= len(server.requests["/0.tar"]) <= num_tries + 6 * ahead
    # Who asks later tries for itself.
    content = content_of_size(0)
    server.url("/0.tar", whole(content))
    with storage.open(url) as file:
        assert read_all(file) == content


def test_a_failure_that_left_bytes_is_shared_and_forgotten(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    content = content_of_size(0)
    url = server.url("/0.tar", whole(content, send=MB // 2, wait=0.5), slow(503))
    storage = make_storage(tmp_path)
    start, results = threading.Barrier(3), FORK.SimpleQueue()
    askers = [
        threading.Thread(target=open_and_report_error, args=(storage, url, False, start, results))
        for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    assert {results.get()[0] for _ in askers} == {"RemoteError"}
    num_requests = len(server.requests["/0.tar"])
    assert num_requests == 4
    server.url("/0.tar", whole(content))
    with make_storage(tmp_path).open(url) as file:
        assert read_all(file) == content
    assert server.requests["/0.tar"][-1].start is not None  # gone on with


def test_equal_names_of_different_urls_do_not_collide(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path)
    paths = ("/a/00000.tar", "/b/00000.tar", "/a/00000.tar?version=2")
    urls = [server.url(path, whole(content_of_size(i))) for i, path in enumerate(paths)]
    for _ in range(2):
        for i, url in enumerate(urls):
            with storage.open(url) as file:
                assert read_all(file) == content_of_size(i)
    names = [path.name for path in files(tmp_path, "-00000.tar")]
    assert len(set(names)) == len(names) == 3


def test_killed_transfer_is_gone_on_with(server: MisbehavingServer, tmp_path: Path) -> None:
    content = content_of_size(0, 8 * MB)
    url = server.url("/0.tar", whole(content, seconds=15), whole(content))
    storage = make_storage(tmp_path)
    victim = FORK.Process(target=lambda: storage.open(url))
    victim.start()
    end = time.monotonic() + 30
    while not any(path.stat().st_size for path in part_files(tmp_path)):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    (partial,) = part_files(tmp_path)
    kept = partial.stat().st_size
    assert files(tmp_path, "-0.tar") == []
    with make_storage(tmp_path).open(url) as file:
        assert read_all(file) == content
    assert [request.start for request in server.requests["/0.tar"]] == [None, kept]
    assert part_files(tmp_path) == []


def part_files(folder: Path) -> list[Path]:
    return files(folder, ".partial") if (folder / "cache").exists() else []


@pytest.mark.parametrize("record", [b"", b'{"size": 1', b"[]", None])
def test_half_written_records_are_not_trusted(
    server: MisbehavingServer, tmp_path: Path, record: bytes | None
) -> None:
    content = content_of_size(0)
    url = server.url("/0.tar", whole(content))
    storage = make_storage(tmp_path)
    storage.open(url).close()
    (copy,) = files(tmp_path)
    lock = copy.with_name(copy.name + ".lock")
    copy.with_name(copy.name + ".partial").write_bytes(bytes(1000))
    if record is None:
        lock.unlink()
    else:
        lock.write_bytes(record)
    with storage.open(url) as file:
        assert read_all(file) == content
    assert [request.start for request in server.requests["/0.tar"]] == [None, None]


def test_copy_of_the_wrong_size_is_fetched_anew(server: MisbehavingServer, tmp_path: Path) -> None:
    content = content_of_size(0)
    url = server.url("/0.tar", whole(content))
    storage = make_storage(tmp_path)
    for size in (0, MB - 1, MB + 1):
        storage.open(url).close()
        (copy,) = files(tmp_path)
        os.truncate(copy, size)
        with storage.open(url) as file:
            assert read_all(file) == content
    assert len(server.requests["/0.tar"]) == 4


def test_least_recently_used_copies_go_first(server: MisbehavingServer, tmp_path: Path) -> None:
    storage = make_storage(tmp_path, megabytes=3.1)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(5)]
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        storage.open(urls[number]).close()
    with storage.open(urls[2]), storage.open(urls[0]):
        storage.open(urls[4]).close()  # in place of 3
    for number in (0, 2, 4, 1):
        storage.open(urls[number]).close()
    assert [len(server.requests[f"/{i}.tar"]) for i in range(5)] == [1, 2, 1, 1, 1]


def test_no_room_beside_what_is_in_use_is_named(server: MisbehavingServer, tmp_path: Path) -> None:
    storage = make_storage(tmp_path, megabytes=2.5)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(3)]
    with storage.open(urls[0]) as first, storage.open(urls[1]) as second:
        storage.prefetch(urls[2:])  # silent
        rule = r"data\.cache\.max_gib \(0\.0023.*\) must be at least .* 0\.002 GiB are, .*/2\.tar"
        with pytest.raises(CacheError, match=rule):
            storage.open(urls[2])
        assert read_all(first) == content_of_size(0)
        assert read_all(second) == content_of_size(1)
    storage.open(urls[2]).close()
    large = server.url("/large.tar", whole(content_of_size(3, 3 * MB)))
    with pytest.raises(CacheError, match=r"data\.cache\.max_gib"):
        storage.open(large)
    assert total_size(tmp_path) < 2.5 * MB


def test_room_that_a_transfer_takes_is_waited_for(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=2.5)
    slow = server.url("/slow.tar", whole(content_of_size(0, 2 * MB), seconds=4))
    fast = server.url("/fast.tar", whole(content_of_size(1)))
    storage.prefetch([slow])
    while not part_files(tmp_path):
        time.sleep(0.02)
    with storage.open(fast) as file:
        assert read_all(file) == content_of_size(1)


def test_files_of_others_stay(server: MisbehavingServer, tmp_path: Path) -> None:
    storage = make_storage(tmp_path, megabytes=1.5)
    (tmp_path / "cache" / "folder").mkdir(parents=True)
    foreign = ["notes.txt", "0123456789abcdef-0.tar", "0123456789abcdef-1.tar.partial"]
    for name in foreign:
        (tmp_path / "cache" / name).write_bytes(bytes(2 * MB))
    for number in range(3):
        storage.open(server.url(f"/{number}.tar", whole(content_of_size(number)))).close()
    assert {*foreign, "folder"} <= {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(files(tmp_path)) == 5  # one copy is ours


def close_and_wait(file: Any, done: Any) -> None:
    if file is not None:
        file.close()
    done.wait()


def test_a_copy_open_here_survives_what_a_forked_process_closes(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=1.5)
    urls = [server.url(f"/{i}.tar", whole(content_of_size(i))) for i in range(2)]
    file = storage.open(urls[0])
    for close_there in (True, False):
        done = FORK.Event()
        child = FORK.Process(target=close_and_wait, args=(file if close_there else None, done))
        child.start()
        time.sleep(0.2)
        if close_there:
            with pytest.raises(CacheError, match=r"data\.cache\.max_gib"):
                storage.open(urls[1])
        else:
            file.close()  # the fork, which still has it, does not keep it in use
            storage.open(urls[1]).close()
        done.set()
        child.join(timeout=30)


def test_partial_files_of_given_up_transfers_make_room(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    storage = make_storage(tmp_path, megabytes=2.5)
    cut = whole(content_of_size(0, 2 * MB), send=MB)
    broken = server.url("/broken.tar", cut, status(503))
    with pytest.raises(RemoteError):
        storage.open(broken)
    assert len(part_files(tmp_path)) == 1
    storage.open(server.url("/0.tar", whole(content_of_size(1)))).close()
    assert part_files(tmp_path) == []


def open_with_small_files(storage: Storage, url: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, MB // 2))
    try:
        storage.open(url)
    except CacheError as error:
        results.put(str(error))


def test_disk_errors_are_named_and_not_tried_again(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    url = server.url("/0.tar", whole(content_of_size(0, 3 * MB)))
    results = FORK.SimpleQueue()
    storage = make_storage(tmp_path)
    child = FORK.Process(target=open_with_small_files, args=(storage, url, results))
    child.start()
    child.join(timeout=30)
    assert results.get().startswith(f"data.cache.dir ({tmp_path}/cache) must be a folder on")
    assert len(server.requests["/0.tar"]) == 1
    assert files(tmp_path, "0.tar") == part_files(tmp_path) == []


def cycle(storage: Storage, urls: list[str], digests: list[str], seed: int, results: Any) -> None:
    order = random.Random(seed)
    held: list[tuple[int, Any]] = []
    wrong = 0
    for step in range(40):
        number = order.randrange(len(urls))
        storage.prefetch([urls[order.randrange(len(urls))]])
        held.append((number, storage.open(urls[number])))
        if len(held) > 1 or step == 39:
            index, file = held.pop(0)
            wrong += digest(read_all(file)) != digests[index]
            file.close()
    results.put(wrong)


def test_size_holds_while_processes_cycle_through_more_than_fits(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    contents = [content_of_size(i, MB // 2 + 100_000 * i) for i in range(12)]  # 12.6 MB
    urls = [server.url(f"/{i}.tar", whole(content)) for i, content in enumerate(contents)]
    limit = 11 * MB  # three processes, each with two open and two on their way
    storages = [make_storage(tmp_path, megabytes=11) for _ in range(3)]
    results = FORK.SimpleQueue()
    digests = list(map(digest, contents))
    processes = [
        FORK.Process(target=cycle, args=(storage, urls, digests, seed, results))
        for seed, storage in enumerate(storages)
    ]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        if (tmp_path / "cache").exists():
            largest = max(largest, total_size(tmp_path))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [results.get() for _ in processes] == [0, 0, 0]
    records = 12 * 200
    assert 5 * MB < largest <= limit + records
    assert sum(map(len, server.requests.values())) > 12  # some had to go

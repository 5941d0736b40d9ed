"""The map over processes keeps the order, is bounded, and ends its processes when closed."""

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from ds_linclip.data.parallel_map import ordered_map


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def interruptible() -> Iterator[None]:
    """Let processes started in this context react to Ctrl-C, even if this one ignores it.

    A shell without job control starts background jobs, such as ``make test &`` in a script, with
    SIGINT ignored, and their processes inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order_and_few_items_wait(num_workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1, 101):
            taken += 1
            yield item

    with closing(ordered_map(operator.neg, items(), num_workers=num_workers)) as results:
        for number, result in enumerate(results, start=1):
            assert result == -number
            assert taken - number < 4 * num_workers
    assert taken == 100


@pytest.mark.parametrize("num_workers", [1, 2])
def test_error_of_one_item_reaches_the_caller(num_workers: int) -> None:
    results = ordered_map(operator.index, [1, "two", 3], num_workers=num_workers)
    assert next(results) == 1
    with pytest.raises(TypeError, match="str"):
        next(results)


def test_error_of_the_data_is_one_line_and_keeps_the_traceback_of_its_worker() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        list(ordered_map(os.stat, ["/none"], num_workers=1))
    assert str(caught.value) == "[Errno 2] No such file or directory: '/none'"
    (note,) = caught.value.__notes__
    assert "Traceback" in note
    assert "self.function(item)" in note


@pytest.mark.long
@pytest.mark.faults
def test_killed_worker_is_told_with_the_next_result_and_nowhere_else() -> None:
    before = multiprocessing.active_children()
    results = ordered_map(operator.neg, range(100), num_workers=1)
    assert next(results) == 0
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # a signal would be handled here
    with pytest.raises(RuntimeError, match=r"worker .* exited unexpectedly|worker is gone"):
        list(results)


def test_closing_early_ends_the_processes() -> None:
    before = multiprocessing.active_children()  # of a test whose error still holds its workers
    with closing(ordered_map(operator.neg, range(10**9), num_workers=2)) as results:
        assert [next(results) for _ in range(3)] == [0, -1, -2]
        workers = [each for each in multiprocessing.active_children() if each not in before]
        assert len(workers) == 2
    for worker in workers:
        worker.join(timeout=30)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_command_leaves_no_files_and_no_processes(
    tmp_path: Path, number: signal.Signals, code: int, told: str
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3000):
        if index == 0:
            Image.new("RGB", (600, 600)).save(tmp_path / "images" / "0.jpg")
        else:
            os.link(tmp_path / "images" / "0.jpg", tmp_path / "images" / f"{index}.jpg")
        (tmp_path / "images" / f"{index}.txt").write_text("black")
    command = [Path(sys.executable).parent / "linclip", "shards", "make", "folder"]
    arguments = [tmp_path / "images", tmp_path / "out", "--workers", "2", "--resize", "border"]
    with interruptible():
        running = subprocess.Popen(
            [str(word) for word in (*command, *arguments, "--image-size", "512")],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    while not any(path.stat().st_size for path in tmp_path.glob(".*/*.tar")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    os.killpg(running.pid, number)  # to all processes, as Ctrl-C does
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    assert [line for line in errors.splitlines() if "image/s" not in line] == [told]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    deadline = time.monotonic() + 10
    while is_group_alive(running.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)

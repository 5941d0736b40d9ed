"""Everything below a killed process ends with it, multiprocessing's fork server included."""

import subprocess
import sys
import time

import psutil
import pytest

from linclip_launch.supervise import is_running

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's"),
]

#: A launcher that starts a rank; the rank has a data worker and a pool of processes.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
rank.wait()
"""
RANK = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.process.parent_death import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    batches = ordered_map(abs, range(10**6), num_workers=1)
    next(batches)
    server = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(2, mp_context=server, initializer=end_with_parent)
    assert list(pool.map(abs, [-1, -2])) == [1, 2]
    print("ready", flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_killed_launcher():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    below = psutil.Process(launcher.pid).children(recursive=True)
    everything = [launcher.pid, *(process.pid for process in below)]
    # Launcher, rank, data worker, forkserver, its resource tracker, two of the pool.
    assert len(everything) >= 6
    launcher.kill()
    started = time.monotonic()
    launcher.wait()
    while any(map(is_running, everything)):
        assert time.monotonic() - started < 15, [p for p in everything if is_running(p)]
        time.sleep(0.02)

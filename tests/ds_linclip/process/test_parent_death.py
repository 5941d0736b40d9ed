"""What a killed process has started ends with it, multiprocessing's server included."""

import subprocess
import sys
import time

import pytest

from linclip_launch.process_tree import below, is_running

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's"),
]

#: A launcher that starts a rank; the rank has a data worker and a pool of processes.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
rank.wait()
"""
RANK = """
import time
from ds_linclip.data.loader import ordered_loader
from ds_linclip.data.prepare.parallel_map import ordered_map
from ds_linclip.process.parent_death import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    batches = iter(ordered_loader(list(range(10**6)), range(10**6), num_workers=1))
    next(batches)
    mapped = ordered_map(abs, range(10**6), num_workers=2)
    next(mapped)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_killed_launcher():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    everything = [launcher.pid, *below(launcher.pid)]
    # Launcher, rank, data worker, forkserver, its resource tracker, two of the pool.
    assert len(everything) >= 6
    launcher.kill()
    begun = time.monotonic()
    launcher.wait()
    while any(map(is_running, everything)):
        assert time.monotonic() - begun < 15, [p for p in everything if is_running(p)]
        time.sleep(0.02)

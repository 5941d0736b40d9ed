"""Signals to the process that a user started: the step is saved, and nothing is left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import EMBEDDED, REPOSITORY, job_environment

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
BIN = Path(sys.executable).parent
MODULE = "linclip_launch.train"
#: Launcher -> its command, before the config.
LAUNCHERS = {
    "linclip": [BIN / "linclip", "train", "--ranks", 2],
    "first process": [
        *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *(BIN / "linclip", "train", "--ranks", 2),
    ],
    "deepspeed": [
        *(BIN / "deepspeed", "--quiet", "--num_gpus", 2, "--master_port", "PORT"),
        *("--module", MODULE),
    ],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "-m", MODULE],
}
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
#: Launcher, signal, and the exit code of the process that got it; the rest of docs/faults.md.
CASES = [
    ("linclip", TERM, 75),
    ("linclip", KILL, -KILL),
    ("first process", TERM, 75),
    ("deepspeed", TERM, -TERM),
    ("torchrun", TERM, 1),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            *(("linclip", INT, 75), ("first process", INT, 75), ("torchrun", INT, 1)),
            *(("deepspeed", INT, -INT), ("deepspeed", KILL, -KILL)),
        ]
    ),
]


@pytest.mark.parametrize(("launcher", "number", "exit_code"), CASES)
def test_signal_saves_a_step_and_leaves_no_process(
    launcher, number, exit_code, embedded_overrides, tmp_path
):
    if launcher == "first process" and (os.getuid() != 0 or shutil.which("unshare") is None):
        pytest.skip("a process namespace needs root and unshare")
    job = [EMBEDDED, *embedded_overrides, f"output_dir={tmp_path}", "name=run", "eval.data=null"]
    plan = ["train.steps=100000", "checkpoint.every_steps=0", "log.every_steps=1"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    words = [str(word) for word in (*LAUNCHERS[launcher], *job, *plan)]
    log = tmp_path / "log"
    with log.open("w") as file:
        started = subprocess.Popen(
            [word.replace("PORT", port) for word in words],
            cwd=REPOSITORY,
            env=job_environment(OMP_NUM_THREADS="1"),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or '"step": 3,' not in metrics.read_text():
        is_training = started.poll() is None and time.monotonic() < deadline
        assert is_training, log.read_text()
        time.sleep(0.05)
    below = psutil.Process(started.pid).children(recursive=True)
    os.kill(below[0].pid if launcher == "first process" else started.pid, number)
    left = psutil.wait_procs(below, timeout=60)[1]
    for process in left:
        process.kill()
    assert not left, log.read_text()
    assert started.wait(timeout=5) == exit_code, log.read_text()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert saved.name == f"step-{last['step']:08d}"

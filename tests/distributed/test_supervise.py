"""Runs under ``linclip train --supervise`` that are killed and end with the losses of any other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ds_linclip.config import load_config
from ds_linclip.process.exit_codes import ExitCode
from helpers import EMBEDDED, REPOSITORY
from helpers.forked_ranks import train_in_ranks
from helpers.killed_runs import batches
from linclip_launch.supervise import is_running, launcher_and_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
SUPERVISE = ["-m", "linclip_launch", "train", "--supervise"]
STEPS = 60


@pytest.fixture(scope="module")
def overrides(embedded_overrides: list[str]) -> list[str]:
    return [
        *(*embedded_overrides, "eval.data=null", f"train.steps={STEPS}", "optim.warmup_steps=4"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *("data.num_workers=1", "train.global_batch_size=16", "checkpoint.every_steps=5"),
        *("log.every_steps=1", "log.sample_keys=true", "log.tensorboard=false"),
    ]


@pytest.fixture
def supervise() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the supervisor; everything below it ends with the test."""
    started = []

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        running = subprocess.Popen(
            [sys.executable, *map(str, (*SUPERVISE, *arguments))],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(running)
        return running

    yield start
    for running in started:
        for process in [*below(running.pid), running.pid] if running.poll() is None else []:
            os.kill(process, signal.SIGKILL)
        running.communicate()


def below(process: int) -> list[int]:
    return [child.pid for child in psutil.Process(process).children(recursive=True)]


def steps_logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def losses_in(path: Path) -> list[tuple[int, float]]:
    records = map(json.loads, path.read_text().splitlines())
    return [(record["step"], record["train/loss"]) for record in records]


def wait_until(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until, "not within 200 s"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victims",
    [
        ("rank", "launcher"),
        ("stopped rank", "launcher", "rank"),
    ],
)
def test_a_killed_run_ends_like_an_undisturbed_one(victims, supervise, overrides, tmp_path):
    """kill -9 of a rank, SIGSTOP of a rank, kill -9 of the launcher, each in the middle."""
    config = load_config(
        EMBEDDED, [*overrides, f"output_dir={tmp_path}", "name=whole", "data.num_workers=0"]
    )
    whole, _ = train_in_ranks(config, 2)
    run = tmp_path / "killed"
    # Not much longer than a healthy start takes, since the test waits for the hang to be noticed.
    timeout = ["watchdog.timeout_seconds=12"] if "stopped rank" in victims else []
    options = ("--ranks", 2, "--backoff-seconds", 0.1, "--max-restarts", 1)
    running = supervise(
        *options, EMBEDDED, *overrides, f"output_dir={tmp_path}", "name=killed", *timeout
    )

    seen = 5
    for victim in victims:
        # Newer steps than before, and beyond a checkpoint.
        wait_until(
            lambda seen=seen: any(s > seen and s % 5 == 2 for s in steps_logged(run)), running
        )
        seen = max(steps_logged(run)) + 5
        launcher, ranks = launcher_and_ranks(running.pid)
        everything = [launcher, *below(launcher)]
        assert len(ranks) == 2
        assert len(everything) >= 5  # two data workers
        number = signal.SIGSTOP if victim == "stopped rank" else signal.SIGKILL
        os.kill(launcher if victim == "launcher" else ranks[1], number)
        at = time.monotonic()
        wait_until(lambda left=everything: not any(map(is_running, left)), running)
        seconds = time.monotonic() - at
        assert seconds < {"rank": 35, "stopped rank": 45, "launcher": 10}[victim]
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, out + err
    assert ("error: hang: rank 1 " in err) == ("stopped rank" in victims)

    restarts = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    expected = {
        "rank": (247, "a rank was ended by signal 9", 2),
        "stopped rank": (76, "hung", 2),
        "launcher": (0, "the launcher was killed", 2),
    }
    found = [(each["exit_code"], each["reason"], each["ranks"]) for each in restarts]
    assert found == [expected[victim] for victim in victims]
    steps = [each["step"] for each in restarts]
    assert all(step % 5 == 0 for step in steps)
    assert steps == sorted(set(steps))
    assert all(0.1 <= each["seconds_down"] < 60 for each in restarts)

    # Repeated steps have equal losses, and all losses are those of the undisturbed run.
    assert losses_in(run / "metrics.jsonl") == sorted(whole.items())
    undone = losses_in(run / "metrics_undone.jsonl")
    assert undone
    assert set(undone) <= set(whole.items())
    keys, starts = batches(run)
    assert keys == batches(tmp_path / "whole")[0]
    assert [start for start, _ in sorted(starts)] == [0, *steps]


@pytest.mark.slow
def test_a_users_error_is_not_retried(supervise, overrides, tmp_path):
    running = supervise(
        *(
            "--ranks",
            2,
            EMBEDDED,
            *overrides,
            f"output_dir={tmp_path}",
            "data.train=['no/{0..1}.tar']",
        )
    )
    _, err = running.communicate(timeout=200)
    assert running.returncode == 2, err
    assert err.count("error: ") == 1 + err.count("[ERROR]")
    assert not list(tmp_path.rglob("restarts.jsonl"))


@pytest.mark.slow
def test_a_preempted_run_is_not_restarted(supervise, overrides, tmp_path):
    running = supervise("--ranks", 2, EMBEDDED, *overrides, f"output_dir={tmp_path}")
    wait_until(lambda: len(steps_logged(tmp_path / "embedded")) > 2, running)
    everything = below(running.pid)
    running.terminate()
    out, err = running.communicate(timeout=60)
    assert running.returncode == ExitCode.PREEMPTED, out + err
    assert not any(map(is_running, everything))
    assert not list(tmp_path.rglob("restarts.jsonl"))

"""Ranks that stop or hang while the others wait, and a rank that is slow, in real trainings."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_linclip.config import Config, load_config
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.resilience.watchdog import summarize, watched
from ds_linclip.trainer import train
from helpers import EMBEDDED
from linclip_launch.supervise import is_running

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
TIMEOUT = 5.0


@pytest.fixture(scope="module")
def overrides(embedded_overrides: list[str]) -> list[str]:
    return [
        *(*embedded_overrides, "eval.data=null", "train.steps=100000", "optim.warmup_steps=2"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *("data.num_workers=0", "train.global_batch_size=16", "log.every_steps=1"),
        *("log.tensorboard=false", f"watchdog.timeout_seconds={TIMEOUT}"),
    ]


def train_watched(config: Config, prepare: Callable[[Mesh], None] | None = None) -> None:
    mesh = Mesh.create(config.parallel)
    logging.disable(logging.NOTSET)
    file = logging.FileHandler(config.run_dir.parent / f"rank-{mesh.rank}.log")
    logging.getLogger("ds_linclip").addHandler(file)
    if prepare:
        prepare(mesh)
    with watched(config, mesh) as progress:
        train(config, mesh, phases=progress)
    mesh.close()


def hang_in_step_4(mesh: Mesh) -> None:
    """Have rank 1 hang in the forward of its fourth step."""
    seen = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # The plan at the start takes a step on meta tensors.
        seen.extend([1] * (isinstance(module, CLIP) and not inputs[0].is_meta))
        if mesh.rank == 1 and len(seen) == 4:
            threading.Event().wait()

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def be_slow(mesh: Mesh) -> None:
    """Have the forward of rank 1 take four times as long."""
    delay = 0.6 if mesh.rank == 1 else 0.15

    def hook(module: torch.nn.Module, inputs: object) -> None:
        time.sleep(delay * isinstance(module, CLIP))

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "condition not met in time"
        time.sleep(0.02)


def healthcheck(runs: Path, *options: str) -> tuple[int, str]:
    """Return exit code and output of the command."""
    command = [sys.executable, "-m", "linclip_launch.healthcheck", runs, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def reports(run: Path) -> tuple[str, list[dict], list[str]]:
    """Return the summary, and the facts and stacks of both ranks."""
    (folder,) = (run / "hang").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("rank-00000.txt", "rank-00001.txt", "summary.txt")
    ]
    found = [(folder / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    facts, stacks = zip(*(text.split("\n", 1) for text in found), strict=True)
    return (folder / "summary.txt").read_text(), [json.loads(each) for each in facts], list(stacks)


def test_stopped_rank_is_found_and_named(overrides, tmp_path):
    """After SIGSTOP a rank can do nothing itself; the other one waits in a collective."""
    config = load_config(EMBEDDED, [*overrides, f"output_dir={tmp_path}"])
    run, stopped, checks = config.run_dir, {}, [healthcheck(tmp_path)]

    def stop_rank_1() -> None:
        wait_for(lambda: (run / "metrics.jsonl").exists(), 300)
        sign = json.loads((run / "watchdog" / "rank-00001.json").read_text())
        checks.append(healthcheck(tmp_path))
        os.kill(sign["pid"], signal.SIGSTOP)
        stopped.update(sign, at=time.monotonic())
        time.sleep(2.5)
        checks.append(healthcheck(tmp_path, "--sign-seconds", "2"))
        checks.append(healthcheck(tmp_path, "--phase-seconds", "1"))

    thread = threading.Thread(target=stop_rank_1)
    thread.start()
    with pytest.raises(RuntimeError, match="a rank of 2 failed"):
        run_ranks(2, train_watched, config)
    seconds = time.monotonic() - stopped["at"]
    thread.join()
    assert TIMEOUT - 1 < seconds < TIMEOUT + 10
    # The health check of containers, before there is a run, while it steps and when it does not.
    assert [code for code, _ in checks] == [1, 0, 1, 1], checks
    assert "has given a sign of life" in checks[0][1]
    assert re.match(r"2 ranks of this host are well, step \d+\n", checks[1][1])
    assert re.match(r"rank 1 \(pid \d+\), step \d+, .*: no sign of life for \d s\n", checks[2][1])
    assert re.match(r"rank \d \(pid \d+\), step \d+, .*: in this phase for \d s\n", checks[3][1])
    summary, facts, stacks = reports(run)
    assert re.match(
        rf"hang: rank 1 \(host {stopped['host']}, pid {stopped['pid']}\) is behind: stopped, "
        r"step \d+, \w[\w ]+ for \d+ s; 1 of 2 ranks wait at step \d+, ",
        summary,
    )
    assert [each["state"] for each in facts] == ["running", "stopped"]
    # It was woken to write its stacks, those of the main thread in the loop among them.
    for text in stacks:
        assert re.search(r'File "\S+/ds_linclip/trainer.py", line \d+ in train\n', text)
    wait_for(lambda: not any(is_running(each["pid"]) for each in facts), 5)


@pytest.mark.slow
def test_rank_that_hangs_is_named_with_its_phase(overrides, tmp_path):
    config = load_config(EMBEDDED, [*overrides, f"output_dir={tmp_path}"])
    with pytest.raises(RuntimeError, match="a rank of 2 failed"):
        run_ranks(2, train_watched, config, hang_in_step_4)
    summary, facts, stacks = reports(config.run_dir)
    assert re.match(
        r"hang: rank 1 .* is behind: running, step 4, computing features for \d+ s; "
        r"1 of 2 ranks wait at step 4, computing loss and gradients for",
        summary,
    )
    assert [each["state"] for each in facts] == ["running", "running"]
    assert " in hook" not in stacks[0]
    assert re.search(r"test_watchdog.py\", line \d+ in hook", stacks[1])


def test_slow_rank_is_named_and_does_not_hang(overrides, tmp_path):
    """A rank that is four times slower does not end the run."""
    short = [f"output_dir={tmp_path}", "train.steps=8", "log.every_steps=4"]
    config = load_config(EMBEDDED, [*overrides, *short, "watchdog.timeout_seconds=4"])
    run_ranks(2, train_watched, config, be_slow)
    records = [json.loads(x) for x in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["perf/slowest_rank"] for record in records] == [1, 1]
    for record in records:
        assert 2 < record["perf/slowest_rank_ratio"] < 4.5
    warnings = (tmp_path / "rank-0.log").read_text()
    assert len(re.findall(r"rank 1 \(host \S+\) is slow: 0\.\d+ s of its own per", warnings)) == 1
    assert "slow" not in (tmp_path / "rank-1.log").read_text()
    assert not (config.run_dir / "hang").exists()
    assert not (config.run_dir / "watchdog").exists()


def facts(rank: int, entered: int, state: str = "running", **more: object) -> dict:
    place = {"entered": entered, "step": 7, "phase": f"phase {entered}", "seconds": 9.2}
    return {"rank": rank, "host": "n1", "pid": 100 + rank, "state": state, **place, **more}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            [facts(0, 5), facts(1, 4), facts(2, 5)],
            "hang: rank 1 (host n1, pid 101) is behind: running, step 7, phase 4 for 9 s; "
            "2 of 3 ranks wait at step 7, phase 5 for 9 s",
        ),
        (  # a stopped rank is behind even where it has entered as many phases
            [facts(0, 5), facts(1, 5, "stopped")],
            "hang: rank 1 (host n1, pid 101) is behind: stopped, step 7, phase 5 for 9 s; "
            "1 of 2 ranks wait at step 7, phase 5 for 9 s",
        ),
        (
            [facts(0, 5), {"rank": 1, "state": "silent"}],
            "hang: rank 1 (host unknown, pid unknown) is behind: silent, no sign of life since the "
            "start; 1 of 2 ranks wait at step 7, phase 5 for 9 s",
        ),
        (
            [facts(0, 5), facts(1, 5)],
            "hang: no rank is behind, all 2 are at step 7, phase 5 for 9 s",
        ),
    ],
)
def test_rank_that_is_behind_is_named(found, line):
    assert summarize(found) == line

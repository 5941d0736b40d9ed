"""The supervisor over launchers that are scripts instead of DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ds_linclip.process.exit_codes import ExitCode
from helpers import EMBEDDED
from linclip_launch import supervise
from linclip_launch.cli import main

pytestmark = pytest.mark.long

OVERRIDES = ["data.train=[no.tar]"]  # nothing is read
#: Starts one rank, which ends with exit code 75 when it gets SIGTERM, as training does.
LAUNCHER = """
import subprocess, sys
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
rank += "print('started', flush=True); time.sleep(600)"
sys.exit(subprocess.call([sys.executable, "-c", rank, "--local_rank=0"]))
"""


@pytest.fixture
def run_supervisor(tmp_path) -> Iterator[Callable[[str], int]]:
    """Run the supervisor over a shell script in the place of the launcher."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(script: str) -> int:
        (tmp_path / "launcher").write_text(script)
        arguments = ["train", "--supervise", "--launch", f"sh {tmp_path}/launcher"]
        arguments += ["--backoff-seconds", "0.1"]
        arguments += [str(EMBEDDED), *OVERRIDES, f"output_dir={tmp_path}", "name=run"]
        return main(arguments)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_launch_command_runs_the_training_module_again_after_a_crash(run_supervisor, tmp_path):
    script = (
        f'echo "$@" >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) = 1 ] && exit 1; exit 75'
    )
    assert run_supervisor(script) == ExitCode.PREEMPTED
    call = f"-m linclip_launch.train {EMBEDDED} {OVERRIDES[0]} output_dir={tmp_path} name=run"
    assert (tmp_path / "calls").read_text().splitlines() == [call, call]
    (restart,) = map(json.loads, (tmp_path / "run" / "restarts.jsonl").read_text().splitlines())
    assert (restart["exit_code"], restart["reason"]) == (1, "failed with exit code 1")


def test_what_a_launcher_leaves_behind_is_ended(run_supervisor, tmp_path):
    assert run_supervisor(f"sleep 600 & echo $! > {tmp_path}/pid; exit 2") == ExitCode.USER_ERROR
    assert not supervise.is_running(int((tmp_path / "pid").read_text()))


def test_it_gives_up_after_failures_without_progress(run_supervisor, tmp_path, capsys):
    assert run_supervisor(f"echo >> {tmp_path}/calls; exit 1") == ExitCode.FAILED
    assert "gave up after 3 restarts without progress" in capsys.readouterr().err
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


def launcher_command(tmp_path: Path) -> str:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return f"{sys.executable} {tmp_path}/launcher.py deepspeed.launcher.launch"


def test_ranks_are_the_children_of_the_launcher(tmp_path):
    command = f"{launcher_command(tmp_path)}; true"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout.readline() == "started\n"
        launcher, ranks = supervise.launcher_and_ranks(shell.pid)
        assert launcher is not None
        (rank,) = ranks
        assert supervise.launcher_and_ranks(launcher) == (None, [])  # none below itself
        assert supervise.is_running(rank)
        os.kill(rank, signal.SIGTERM)
    assert not supervise.is_running(rank)


def test_sigterm_to_the_supervisor_goes_to_the_ranks(tmp_path):
    (tmp_path / "launcher").write_text(f"{launcher_command(tmp_path)}; exit $?")
    command = [sys.executable, "-m", "linclip_launch", "train", "--supervise", "--launch"]
    command += [f"sh {tmp_path}/launcher", EMBEDDED, *OVERRIDES]
    command += [f"output_dir={tmp_path}", "name=run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout.readline() == "started\n"
        supervisor.terminate()
        assert supervisor.wait(120) == ExitCode.PREEMPTED
    assert not (tmp_path / "run" / "restarts.jsonl").exists()


def test_second_interrupt_ends_everything_at_once(tmp_path):
    (tmp_path / "launcher").write_text(
        "trap '' TERM; echo started; while true; do sleep 0.1; done\n"  # a rank that hangs
    )
    command = [sys.executable, "-m", "linclip_launch", "train", "--launch"]
    command += [f"sh {tmp_path}/launcher", EMBEDDED, *OVERRIDES]
    command += [f"output_dir={tmp_path}", "name=run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "started\n"
        (launcher,) = psutil.Process(running.pid).children()
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert not supervise.is_running(launcher.pid)

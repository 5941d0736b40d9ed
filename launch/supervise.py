"""Train, and start again from the newest checkpoint whenever the run fails:
``python launch/supervise.py [--ranks N | --hostfile FILE] CONFIG.yaml key=value ...``.

Runs ``deepspeed launch/train.py CONFIG.yaml key=value ...``. Does not start again what finished
(0), what the user must mend (2), what diverged (3) and what was asked to leave (75); passes that
exit code on. Exit code 1: gave up after too many restarts, or nothing fits the hosts that are left.
Every restart is a line of ``restarts.jsonl`` in the run folder.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from process_tree import group_is_running, launcher_and_ranks

from ds_linclip.config import Config, load_config
from ds_linclip.exit_codes import ExitCode
from ds_linclip.supervision import (
    Restart,
    choose_hosts,
    format_hostfile,
    hosts_that_answer,
    newest_step,
    read_hostfile,
    record,
    verdict,
)

TRAIN = Path(__file__).with_name("train.py")


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        supervisor = Supervisor(arguments, config)
        return supervisor.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML experiment")
    parser.add_argument("overrides", nargs="*", help="dotted assignments such as optim.lr=1e-3")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=int, help="ranks on this machine; default: one per GPU")
    where.add_argument("--hostfile", type=Path, help="lines of 'host slots=number'")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        help="failures in a row without a newer checkpoint before giving up; default 3",
    )
    parser.add_argument("--backoff-seconds", type=float, default=5.0, help="before a restart")
    parser.add_argument("--min-nodes", type=int, default=1, help="fewest hosts to run on")
    parser.add_argument(
        "--check-command",
        default="ssh -o BatchMode=yes {host} true",
        help="must end with 0 for a host to be used in a restart; default: %(default)s",
    )
    parser.add_argument("--check-seconds", type=float, default=20.0, help="its time limit")
    parser.add_argument(
        "--deepspeed",
        default="",
        metavar="OPTIONS",
        help="more options of the deepspeed command, in one string",
    )
    return parser


@dataclass
class Supervisor:
    """Starts the run, waits, judges, starts it again."""

    arguments: argparse.Namespace
    config: Config
    _launcher: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _asked_to_leave: bool = field(default=False, init=False)

    def run(self) -> int:
        """Returns the exit code; raises ValueError for a hostfile that cannot be used."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)
        hosts = None
        if self.arguments.hostfile:
            hosts = choose_hosts(self.config, read_hostfile(self.arguments.hostfile))
        failures, run_dir = 0, self.config.run_dir
        while True:
            before = newest_step(run_dir)
            exit_code = self._run_once(hosts)
            ended, step = time.monotonic(), newest_step(run_dir)
            starts_again, reason = verdict(exit_code, is_complete=step >= self.config.train.steps)
            if not starts_again or self._asked_to_leave:
                return exit_code
            failures = 1 if step > before else failures + 1
            if failures > self.arguments.max_restarts:
                self._say(f"{reason}; gave up after {failures - 1} restarts without progress")
                return ExitCode.FAILED
            time.sleep(self.arguments.backoff_seconds)
            if self.arguments.hostfile:
                try:
                    hosts = self._hosts_left()
                except ValueError as error:
                    self._say(f"{reason}; {error}")
                    return ExitCode.FAILED
            if self._asked_to_leave:
                return ExitCode.PREEMPTED
            restart = Restart(
                time=time.time(),
                exit_code=exit_code,
                reason=reason,
                ranks=sum(hosts.values()) if hosts else self.arguments.ranks,
                hosts=list(hosts) if hosts else None,
                step=step,
                seconds_down=round(time.monotonic() - ended, 3),
            )
            record(run_dir, restart)
            self._say(f"{reason}; starting again from step {step}, {restart.ranks or 'all'} ranks")

    def _run_once(self, hosts: dict[str, int] | None) -> int:
        """Run the launcher to its end, and everything that it has started here."""
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--quiet", *shlex.split(self.arguments.deepspeed)]
        if hosts is not None:
            hostfile = self.config.run_dir / "hostfile"
            hostfile.parent.mkdir(parents=True, exist_ok=True)
            hostfile.write_text(format_hostfile(hosts))
            command += ["--hostfile", str(hostfile)]
            if len(hosts) == 1 and not _is_here(next(iter(hosts))):
                command.append("--force_multi")  # DeepSpeed takes a single host for this machine
        else:
            # The port of a killed run may not be free yet.
            command += ["--master_port", str(_free_port())]
            if self.arguments.ranks:
                command += ["--num_gpus", str(self.arguments.ranks)]
        command += [str(TRAIN), self.arguments.config, *self.arguments.overrides]
        # A session of its own: the terminal's Ctrl-C comes here alone, and what is left can be
        # found and ended.
        self._launcher = subprocess.Popen(command, start_new_session=True)
        if self._asked_to_leave:
            self._forward()
        exit_code = self._launcher.wait()
        _end_group(self._launcher.pid)
        return exit_code

    def _hosts_left(self) -> dict[str, int]:
        """Hosts that answer, asked again when too few do: the network may be away for a moment."""
        named = read_hostfile(self.arguments.hostfile)
        seconds = self.arguments.check_seconds
        for tries_left in reversed(range(max(1, self.arguments.max_restarts))):
            left = hosts_that_answer(named, self.arguments.check_command, seconds)
            for host in named.keys() - left.keys():
                self._say(f"host {host} does not answer and is left out")
            try:
                return choose_hosts(self.config, left, self.arguments.min_nodes)
            except ValueError as error:
                if tries_left == 0 or self._asked_to_leave:
                    raise
                self._say(f"{error}; asking again in {seconds:.0f} s")
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        self._asked_to_leave = True
        self._forward()

    def _forward(self) -> None:
        """Ask the ranks to leave.

        Those on this machine are asked themselves, and tell the others: the launcher would end them
        after 30 seconds, whatever they are doing, and hide their exit code. Where all are
        elsewhere, its own way has to do.
        """
        if self._launcher is None or self._launcher.poll() is not None:
            return
        _, ranks = launcher_and_ranks(self._launcher.pid)
        for process in ranks or [self._launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def _say(self, text: str) -> None:
        print(f"supervisor: {text}", file=sys.stderr, flush=True)


def _end_group(leader: int) -> None:
    """End what the launcher has left behind: a second start would meet it in the run folder."""
    while group_is_running(leader):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        time.sleep(0.1)


def _is_here(host: str) -> bool:
    """Whether it is this machine: nobody can listen at another one's address."""
    try:
        with socket.create_server((host, 0)):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())

"""Start the ranks of a run, and with ``linclip train --supervise`` restart them when they fail.

Runs ``deepspeed --module linclip_launch.train CONFIG key=value ...`` on this machine, on the hosts
of a file through ssh, or with ``--node-rank`` on this host only; with ``--launch``, the same module
under another launcher. SIGTERM and Ctrl-C make the ranks save and leave.

A supervised run is not restarted when it finished (exit code 0), when the user must fix something
(2), when it diverged (3), or when it was preempted (75): the command ends with that exit code. Exit
code 1: too many restarts without progress, or too few hosts are left. Every restart is a line of
``restarts.jsonl`` in the run folder.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ds_linclip.config import Config, load_config
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.resilience import restart_policy
from ds_linclip.resilience.restart_policy import Slots, format_slots, newest_step, restart_reason
from linclip_launch.remote_hosts import RemoteHosts

TRAIN = "linclip_launch.train"
#: The command `deepspeed`, of this Python whatever the PATH is.
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
#: Variable with the folder of the data set that the config ``embedded`` reads; default: data.
DATA_VARIABLE = "LINCLIP_DATA"
DEFAULT_PORT = 29500  # torch's and DeepSpeed's


def run(options: argparse.Namespace) -> int:
    """Train as a command line says, and return the exit code.

    Raises:
        ValueError: for a wrong config, or when hosts or options do not allow a start.
    """
    config = load_config(options.config, options.overrides)
    _check_options(options)
    return Supervisor(options, config).run()


def run_preflight(options: argparse.Namespace) -> NoReturn:
    """Become the launcher of the preflight, on this machine or on the hosts of a file."""
    _check_options(options)
    command, environment = [*DEEPSPEED, "--quiet"], dict(os.environ)
    if options.hostfile:
        command += ["--hostfile", str(options.hostfile)]
        for name in ("include", "exclude"):
            command += [f"--{name}={getattr(options, name)}"] if getattr(options, name) else []
    else:
        ranks, is_cpu = options.ranks, _has_no_gpu()
        with suppress(ValueError):  # the preflight itself reports what is wrong with the config
            config = load_config(options.config, options.overrides)
            ranks = _local_ranks(config, options.ranks, is_cpu=is_cpu)
        environment |= _rank_environment(ranks, is_cpu=is_cpu)
        command += ["--master_port", str(_local_port(None))]
        command += ["--num_gpus", str(ranks)] if ranks else []
    command += ["--module", "linclip_launch.preflight", *options.words[1:]]
    os.execve(sys.executable, command, environment)


def _check_options(options: argparse.Namespace) -> None:
    """Check that no option of a command line is without effect."""
    given = {name for name, value in vars(options).items() if value is not None and value != ""}
    ways = [f"--{name}" for name in ("ranks", "hostfile", "launch") if name in given]
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(ways)} exclude each other: each says where ranks start")
    for name in ("include", "exclude", "node_rank", "master_addr"):
        if name in given and "hostfile" not in given:
            raise ValueError(f"--{name.replace('_', '-')} needs --hostfile")


def _has_no_gpu() -> bool:
    """Return whether ranks of this machine run on the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return True
    # In a process of its own, since this one must hold no GPU; Ctrl-C does not reach it.
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(count, capture_output=True, text=True, start_new_session=True)
    if found.returncode:
        raise ValueError(f"torch cannot be imported: {found.stderr.strip().splitlines()[-1]}")
    return int(found.stdout) == 0


def _local_ranks(config: Config, wanted: int | None, *, is_cpu: bool) -> int | None:
    """Return the number of ranks of this machine; None: one per GPU."""
    parallel = config.parallel
    size = (parallel.dp or 0) * parallel.tp * parallel.pp * parallel.cp
    return wanted or size or (2 if is_cpu else None)


def _rank_environment(ranks: int | None, *, is_cpu: bool) -> dict[str, str]:
    """Return variables of the ranks; on the CPU these share the cores, or their threads would slow
    each other down."""
    if not is_cpu:
        return {}
    threads = max(1, len(os.sched_getaffinity(0)) // (ranks or 1))
    found = {"DS_ACCELERATOR": "cpu"}
    return found if "OMP_NUM_THREADS" in os.environ else found | {"OMP_NUM_THREADS": str(threads)}


def _make_embedded_data(config: Config) -> None:
    """Write the data set of the config ``embedded`` where a config reads it and it is missing."""
    place = os.path.expanduser(os.environ.get(DATA_VARIABLE, "data"))
    folder = Path(os.path.abspath(place)) / "embedded"
    is_read = any(source.shards.startswith(f"{folder}/") for source in config.data.train)
    if is_read and not folder.exists():
        print(f"{folder} is missing: writing it", file=sys.stderr, flush=True)
        make = ["shards", "make", "digits", str(folder)]
        # In a process of its own: this one must hold neither torch nor a GPU.
        made = subprocess.run([sys.executable, "-m", "linclip_launch", *make])
        if made.returncode:
            sys.exit(made.returncode)


class Supervisor:
    """Starts the run of a parsed command line, waits for its end, decides, and restarts it."""

    def __init__(self, arguments: argparse.Namespace, config: Config) -> None:
        self.arguments, self.config = arguments, config
        self._remote = RemoteHosts(arguments.remote_shell, arguments.check_seconds)
        self._hosts: Slots = {}
        self._port: int | None = None
        self._launcher: subprocess.Popen[bytes] | None = None
        self._must_leave = False
        self._ranks: int | None = None
        self._environment = dict(os.environ)

    def _is_last(self, step: int) -> bool:
        """Whether the run ends with this step; with ``train.epochs`` its folder says how many there
        are."""
        steps, saved = self.config.train.steps, self.config.run_dir / "config.yaml"
        if self.config.train.epochs is not None:
            steps = load_config(saved).train.steps if saved.exists() else 0
        return 0 < steps <= step

    def run(self) -> int:
        """Supervise the run to its end; return the exit code of this command.

        Raises:
            ValueError: when the hosts or options do not allow a first start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)
        self._choose_hosts()
        if not self._hosts and not self.arguments.launch:
            is_cpu = _has_no_gpu()
            self._ranks = _local_ranks(self.config, self.arguments.ranks, is_cpu=is_cpu)
            self._environment |= _rank_environment(self._ranks, is_cpu=is_cpu)
        _make_embedded_data(self.config)
        failures, run_dir = 0, self.config.run_dir
        while True:
            before = newest_step(run_dir)
            exit_code = self._run_once()
            ended, step = time.monotonic(), newest_step(run_dir)
            reason = restart_reason(exit_code, is_complete=self._is_last(step))
            if reason is None:
                return exit_code
            if self._must_leave:
                return ExitCode.PREEMPTED
            if not self.arguments.supervise:
                self._say(f"{reason}; the same command resumes the run")
                return ExitCode.HUNG if exit_code == ExitCode.HUNG else ExitCode.FAILED
            failures = 1 if step > before else failures + 1
            if failures > self.arguments.max_restarts:
                self._say(f"{reason}; gave up after {failures - 1} restarts without progress")
                return ExitCode.FAILED
            time.sleep(self.arguments.backoff_seconds)
            try:
                self._choose_remaining_hosts()
            except ValueError as error:
                self._say(f"{reason}; {error}")
                return ExitCode.FAILED
            if self._must_leave:
                return ExitCode.PREEMPTED
            ranks = sum(map(len, self._hosts.values())) or self._ranks
            if not self.arguments.node_rank:  # one line for all hosts
                restart = restart_policy.Restart(
                    time=time.time(),
                    exit_code=exit_code,
                    reason=reason,
                    ranks=ranks,
                    hosts=list(self._hosts) or None,
                    step=step,
                    seconds_down=round(time.monotonic() - ended, 3),
                )
                restart_policy.record_restart(run_dir, restart)
            self._say(f"{reason}; restarting from step {step}, {ranks or 'all'} ranks")

    def _run_once(self) -> int:
        """Run the launcher, and end what it leaves behind; return its exit code."""
        if self._is_remote:
            hostfile = self.config.run_dir / "hostfile"  # in a folder that all hosts see
            hostfile.parent.mkdir(parents=True, exist_ok=True)
            hostfile.write_text(self.arguments.hostfile.read_text())
            commands = {host: self._command(i, hostfile) for i, host in enumerate(self._hosts)}
            return self._remote.run(commands, lambda: self._must_leave)
        # In its own session: the terminal's Ctrl-C reaches the supervisor only, and what is left
        # behind can be found and ended.
        command = self._command(self.arguments.node_rank, self.arguments.hostfile)
        self._launcher = subprocess.Popen(command, start_new_session=True, env=self._environment)
        if self._must_leave:
            self._request_to_leave()
        exit_code = self._launcher.wait()
        _end_group(self._launcher.pid)
        return exit_code

    def _command(self, node_rank: int | None, hostfile: Path | None) -> list[str]:
        """Return the command that runs the ranks of one host, or of all."""
        arguments = self.arguments
        train = [TRAIN, arguments.config, *arguments.overrides]
        if arguments.launch:
            return [*shlex.split(arguments.launch), "-m", *train]
        command = [*DEEPSPEED, "--quiet"]
        # The port of a killed run may not be free yet.
        command += ["--master_port", str(self._port or _local_port(self.arguments.master_port))]
        if node_rank is not None:
            # The option names the first host of the file, which may be left out.
            first = next(iter(self._hosts))
            is_there = first == next(iter(self._named_hosts()))
            command += ["--no_ssh", "--node_rank", str(node_rank)]
            command += ["--master_addr", (is_there and arguments.master_addr) or first]
            command += ["--hostfile", str(hostfile), "--include", format_slots(self._hosts)]
        elif self._ranks:
            command += ["--num_gpus", str(self._ranks)]
        return [*command, *shlex.split(arguments.deepspeed), "--module", *train]

    @property
    def _is_remote(self) -> bool:
        return bool(self._hosts) and self.arguments.node_rank is None

    def _choose_hosts(self) -> None:
        """Choose the hosts of the first start; all must reply: only the user leaves one out."""
        arguments = self.arguments
        if not arguments.hostfile:
            return
        named = self._named_hosts()
        chosen = restart_policy.choose_hosts(self.config, named, arguments.min_nodes)
        used, slots = (sum(map(len, hosts.values())) for hosts in (chosen, named))
        if used < slots:
            self._say(f"{used} of {slots} slots are used: no more fit the batch and the layout")
        if arguments.node_rank is None:
            first = next(iter(chosen))
            unusable = self._remote.unusable(named, arguments.master_addr or first)
            problems = (
                f"host {host} cannot take part ({reason}): fix it, or leave it out with "
                f"--exclude {host}"
                for host, reason in unusable.items()
            )
            if unusable:
                raise ValueError("; ".join(problems))
            self._port = self._remote.port(first, arguments.master_port)
        elif not 0 <= arguments.node_rank < len(chosen):
            raise ValueError(
                f"--node-rank ({arguments.node_rank}) must be from 0 to {len(chosen) - 1}, the "
                f"place of this host among {', '.join(chosen)}"
            )
        else:
            self._port = arguments.master_port or DEFAULT_PORT
            if arguments.node_rank == 0:
                _local_port(self._port)
        self._hosts = chosen

    def _choose_remaining_hosts(self) -> None:
        """Choose among the hosts that reply. If they are too few, all are checked again, since the
        network may be down for a moment."""
        if not self._is_remote:
            return
        arguments, named = self.arguments, self._named_hosts()
        for tries_left in reversed(range(max(1, arguments.max_restarts))):
            unusable = self._remote.unusable(named)
            for host, reason in unusable.items():
                self._say(f"host {host} does not answer and is left out: {reason}")
            left = {host: slots for host, slots in named.items() if host not in unusable}
            try:
                self._hosts = restart_policy.choose_hosts(self.config, left, arguments.min_nodes)
                self._port = self._remote.port(next(iter(self._hosts)), arguments.master_port)
                return
            except ValueError as error:
                if tries_left == 0 or self._must_leave:
                    raise
                self._say(f"{error}; checking again in {arguments.check_seconds:.0f} s")
                time.sleep(arguments.check_seconds)

    def _named_hosts(self) -> Slots:
        hosts = restart_policy.read_hostfile(self.arguments.hostfile)
        return restart_policy.select_slots(hosts, self.arguments.include, self.arguments.exclude)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        if self._must_leave and number == signal.SIGINT:  # Ctrl-C again: do not wait for a save
            if self._launcher is not None:
                _end_group(self._launcher.pid)
            raise KeyboardInterrupt
        self._must_leave = True
        self._request_to_leave()

    def _request_to_leave(self) -> None:
        """Send SIGTERM to the ranks of this machine.

        Not to their launcher, which would kill them after 30 seconds, whatever they are doing, and
        hide their exit code; unless no rank has started yet.
        """
        if self._launcher is None or self._launcher.poll() is not None:
            return
        _, ranks = launcher_and_ranks(self._launcher.pid)
        for process in ranks or [self._launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def _say(self, text: str) -> None:
        who = "supervisor" if self.arguments.supervise else "linclip train"
        print(f"{who}: {text}", file=sys.stderr, flush=True)


def launcher_and_ranks(process: int) -> tuple[int | None, list[int]]:
    """Return the deepspeed launcher below a process, None if it has not started, and its ranks.

    Data workers are forks of the ranks with the same command line: only children of the launcher
    are ranks.
    """
    for each in psutil.Process(process).children(recursive=True):
        if "deepspeed.launcher.launch" in _command_of(each):
            with suppress(psutil.NoSuchProcess):
                children = [(child.pid, " ".join(_command_of(child))) for child in each.children()]
                return each.pid, sorted(pid for pid, line in children if "--local_rank=" in line)
    return None, []


def _command_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):  # it has ended
        return process.cmdline()
    return []


def is_running(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def _end_group(leader: int) -> None:
    """End what the launcher has left behind; it would keep the run folder locked."""
    while any(_is_in_group(process, leader) for process in psutil.pids()):
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        time.sleep(0.1)


def _is_in_group(process: int, leader: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getpgid(process) == leader and is_running(process)
    return False


def _local_port(wanted: int | None) -> int:
    """Return the wanted port of this host, or a free one; ValueError when it is taken."""
    try:
        with socket.create_server(("", wanted or 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ValueError(
            f"--master-port ({wanted}) is taken on this host: choose another one for all hosts"
        ) from error

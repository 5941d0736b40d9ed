"""Starts a run again after a failure: what to do when it ends, where to start it, what to note.

Imports no torch: the supervisor lives as long as the run, and must not hold a GPU or gigabytes.
"""

import json
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_linclip.checkpoint.directory import committed, step_of
from ds_linclip.config import Config, check_batch
from ds_linclip.process.exit_codes import ExitCode

__all__ = [
    "Answer",
    "Restart",
    "Slots",
    "ask_hosts",
    "choose_hosts",
    "format_slots",
    "newest_step",
    "read_hostfile",
    "record",
    "select_slots",
    "verdict",
]

#: Numbers of the slots of a host, by host, in the order of their ranks.
Slots = dict[str, list[int]]

#: Exit code of ssh and pdsh for a connection that cannot be made, or breaks.
_SSH_FAILED = 255

#: After these the run must not be started again.
_FINAL = {
    ExitCode.USER_ERROR: "the user's to mend",
    ExitCode.DIVERGED: "diverged",
    ExitCode.PREEMPTED: "asked to leave",
}


@dataclass(kw_only=True)
class Restart:
    """A line of ``restarts.jsonl``.

    Attributes:
        time: Unix time of the new start.
        exit_code: Of the launcher.
        reason: In words.
        ranks: Ranks that are started now.
        hosts: Hosts they run on; None on this machine alone.
        step: That of the newest checkpoint, from which the run goes on; 0 without one.
        seconds_down: From the end of the launcher to its new start.
    """

    time: float
    exit_code: int
    reason: str
    ranks: int | None
    hosts: list[str] | None
    step: int
    seconds_down: float


@dataclass(frozen=True)
class Answer:
    """What came of a command: whether it ended with 0, and the last line that it said."""

    is_good: bool
    text: str


def record(run_dir: Path, restart: Restart) -> None:
    """Add a line to ``restarts.jsonl`` of the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "restarts.jsonl").open("a") as file:
        file.write(json.dumps(asdict(restart)) + "\n")


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, valid or not; 0 without one."""
    found = committed(run_dir / "checkpoints")
    return step_of(found[-1]) if found else 0


def verdict(exit_code: int, *, is_complete: bool) -> tuple[bool, str]:
    """Whether to start again after the launcher ended, and why in words.

    Args:
        exit_code: Of the ``deepspeed`` command; negative when a signal ended it. It is that of the
            first rank that failed, as a byte: 247 is -9, SIGKILL.
        is_complete: A checkpoint of the last step is there. The command ends with 0 also when what
            it has started was killed.
    """
    if exit_code in _FINAL:
        return False, _FINAL[ExitCode(exit_code)]
    if exit_code == ExitCode.FINISHED:
        return not is_complete, "finished" if is_complete else "the launcher was killed"
    if exit_code == ExitCode.HUNG:
        return True, "hung"
    if exit_code == _SSH_FAILED:
        return True, "a host was lost"
    if exit_code < 0:
        signal = -exit_code
    else:  # srun says 137 where deepspeed says 247
        signal = 256 - exit_code if exit_code >= 192 else exit_code - 128
    if 0 < signal <= 64:
        who = "the launcher" if exit_code < 0 else "a rank"
        return True, f"{who} was ended by signal {signal}"
    return True, f"failed with exit code {exit_code}"


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file.

    Raises:
        ValueError: naming the file, the line and what does not fit.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"hostfile ({path}) cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"hostfile ({path}), line {number}: {line.strip()!r}"
        match = re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*(#.*)?", line)
        if match is None:
            raise ValueError(f"{where} must be 'host slots=number'")
        if match[1] in hosts:
            raise ValueError(f"{where} names {match[1]} again: give it one line with all its slots")
        if int(match[2]) == 0:
            raise ValueError(
                f"{where} must have a slot or more: take {match[1]} out to leave it out"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"hostfile ({path}) must name at least one host")
    return hosts


def select_slots(hosts: Mapping[str, int], include: str = "", exclude: str = "") -> Slots:
    """What is left of the hosts, in DeepSpeed's words: ``host@host:slot,slot``.

    Raises:
        ValueError: for a host or a slot that is not there, for both at once, for nothing left.
    """
    every = {host: list(range(slots)) for host, slots in hosts.items()}
    if include and exclude:
        raise ValueError(f"--include ({include}) and --exclude ({exclude}) exclude each other")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    named: Slots = {}
    for part in filter(None, text.split("@")):
        host, _, numbers = part.partition(":")
        known = ", ".join(hosts)
        if host not in hosts:
            raise ValueError(f"{option} ({text}): host {host} must be in the hostfile ({known})")
        if not re.fullmatch(r"(\d+(,\d+)*)?", numbers):
            raise ValueError(f"{option} ({text}): {part!r} must be host or host:slot,slot")
        slots = [int(number) for number in numbers.split(",")] if numbers else every[host]
        if max(slots) >= hosts[host]:
            raise ValueError(
                f"{option} ({text}): host {host} has {hosts[host]} slots, numbered from 0"
            )
        named[host] = sorted({*named.get(host, []), *slots})
    left = {
        host: [slot for slot in slots if (slot in named.get(host, [])) == bool(include)]
        for host, slots in every.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"{option} ({text}) must leave a slot or more")
    return left


def format_slots(slots: Slots) -> str:
    """The text that :func:`select_slots` and ``deepspeed --include`` read."""
    return "@".join(f"{host}:{','.join(map(str, its))}" for host, its in slots.items())


def ask_hosts(commands: Mapping[str, list[str]], timeout: float) -> dict[str, Answer]:
    """Run a command for every host, all at once; what came of it, by host.

    Args:
        commands: By host.
        timeout: Seconds.
    """

    def ask(host: str) -> Answer:
        try:
            done = subprocess.run(
                commands[host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Answer(False, f"no answer in {timeout:.0f} s")
        except OSError as error:
            return Answer(False, str(error))
        is_good = done.returncode == 0
        said = (done.stdout if is_good else done.stderr).strip().splitlines()
        return Answer(is_good, said[-1] if said else f"exit code {done.returncode}")

    with ThreadPoolExecutor(32) as pool:
        return dict(zip(commands, pool.map(ask, commands), strict=True))


def choose_hosts(config: Config, hosts: Slots, min_nodes: int = 1) -> Slots:
    """The most ranks that the layout and the batch allow, on the given hosts.

    The number of ranks must be a multiple of tp x pp x cp; what is left, the data-parallel size,
    must divide the batch into whole micro-batches, and equal ``parallel.dp`` if that is set. Hosts
    are filled in order; the last one may get fewer ranks than it has slots, and hosts that get none
    are left out.

    Args:
        config: Of the run.
        hosts: Slots by host.
        min_nodes: Fewest hosts to run on.

    Raises:
        ValueError: when nothing fits, or when too few hosts are left.
    """
    if len(hosts) < min_nodes:
        names = ", ".join(hosts) or "none"
        raise ValueError(f"--min-nodes ({min_nodes}) is more than the hosts that answer ({names})")
    parallel = config.parallel
    others, total = parallel.tp * parallel.pp * parallel.cp, sum(map(len, hosts.values()))
    for dp_size in range(total // others, 0, -1):
        if parallel.dp not in (None, dp_size) or not _divides_batch(config, dp_size):
            continue
        chosen, wanted = {}, dp_size * others
        for host, slots in hosts.items():
            if wanted > 0:
                chosen[host] = slots[:wanted]
                wanted -= len(chosen[host])
        if len(chosen) < min_nodes:
            break
        return chosen
    names = ", ".join(f"{host} {len(slots)}" for host, slots in hosts.items())
    raise ValueError(
        f"no number of ranks fits the {total} slots of {len(hosts)} hosts ({names}): it must be a "
        f"multiple of parallel.tp x pp x cp ({others}), the data-parallel size must divide "
        f"train.global_batch_size ({config.train.global_batch_size}) into micro-batches of "
        f"train.micro_batch_size ({config.train.micro_batch_size}) and be parallel.dp "
        f"({parallel.dp}) if set, and --min-nodes ({min_nodes}) hosts must have ranks"
    )


def _divides_batch(config: Config, dp_size: int) -> bool:
    try:
        check_batch(config, dp_size)
    except ValueError:
        return False
    return True

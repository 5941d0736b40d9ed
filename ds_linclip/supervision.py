"""Starts a run again after a failure: what to do when it ends, where to start it, what to note.

Imports no torch: the supervisor lives as long as the run, and must not hold a GPU or gigabytes.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_linclip.checkpoint_folder import committed, step_of
from ds_linclip.config import Config, check_batch
from ds_linclip.exit_codes import ExitCode

__all__ = [
    "Restart",
    "choose_hosts",
    "format_hostfile",
    "hosts_that_answer",
    "newest_step",
    "read_hostfile",
    "record",
    "verdict",
]

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
    signal = -exit_code if exit_code < 0 else 256 - exit_code
    if 0 < signal <= 64:
        who = "the launcher" if exit_code < 0 else "a rank"
        return True, f"{who} was ended by signal {signal}"
    return True, f"failed with exit code {exit_code}"


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file.

    Raises:
        ValueError: naming the file and what does not fit.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"hostfile ({path}) cannot be read: {error}") from error
    hosts: dict[str, int] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line)
        if match is None or match[1] in hosts:
            raise ValueError(f"hostfile ({path}): {line!r} must be a new 'host slots=number'")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"hostfile ({path}) must name at least one host")
    return hosts


def format_hostfile(hosts: Mapping[str, int]) -> str:
    """The text that :func:`read_hostfile` reads."""
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


def hosts_that_answer(hosts: Mapping[str, int], command: str, timeout: float) -> dict[str, int]:
    """Those of the hosts for which a command ends with 0 in time; all are asked at once.

    Args:
        hosts: Slots by host.
        command: With ``{host}`` in it; no shell runs it.
        timeout: Seconds.
    """

    def answers(host: str) -> bool:
        try:
            done = subprocess.run(
                shlex.split(command.replace("{host}", host)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    with ThreadPoolExecutor(min(32, len(hosts))) as pool:
        answered = list(pool.map(answers, hosts))
    return {host: hosts[host] for host, good in zip(hosts, answered, strict=True) if good}


def choose_hosts(config: Config, hosts: Mapping[str, int], min_nodes: int = 1) -> dict[str, int]:
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
    others, slots = parallel.tp * parallel.pp * parallel.cp, sum(hosts.values())
    for dp_size in range(slots // others, 0, -1):
        if parallel.dp not in (None, dp_size) or not _divides_batch(config, dp_size):
            continue
        chosen, wanted = {}, dp_size * others
        for host, available in hosts.items():
            if wanted > 0:
                chosen[host] = min(available, wanted)
                wanted -= chosen[host]
        if len(chosen) < min_nodes:
            break
        return chosen
    raise ValueError(
        f"no number of ranks fits the {slots} slots of {len(hosts)} hosts: it must be a multiple "
        f"of parallel.tp x pp x cp ({others}), the data-parallel size must divide "
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

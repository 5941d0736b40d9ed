"""Whether, and where, the supervisor restarts a run that has ended, and its record of restarts.

Imports no torch: the supervisor lives as long as the run, and must not hold a GPU or gigabytes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_linclip.checkpoint.directory import committed, step_of
from ds_linclip.config import Config, check_batch
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.process.text_files import read_text, split_lines

__all__ = [
    "Restart",
    "Slots",
    "choose_hosts",
    "format_slots",
    "newest_step",
    "read_hostfile",
    "record_restart",
    "restart_reason",
    "select_slots",
]

#: Numbers of the slots of each host, in the order of their ranks.
Slots = dict[str, list[int]]

#: Exit code of ssh and pdsh for a connection that cannot be made, or breaks.
_SSH_FAILED = 255


@dataclass(kw_only=True)
class Restart:
    """A line of ``restarts.jsonl``."""

    time: float  #: Unix time of the restart.
    exit_code: int  #: The exit code of the launcher that ended.
    reason: str  #: Why the run ended, in words.
    ranks: int | None  #: The number of ranks that are started.
    hosts: list[str] | None  #: The hosts they run on; None on this machine alone.
    step: int  #: The step of the newest checkpoint, from which the run resumes; 0 without one.
    seconds_down: float  #: From the end of the launcher to the restart.


def record_restart(run_dir: Path, restart: Restart) -> None:
    """Add a line to ``restarts.jsonl`` in the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "restarts.jsonl").open("a") as file:
        file.write(json.dumps(asdict(restart)) + "\n")


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest committed checkpoint, valid or not; 0 without one."""
    found = committed(run_dir / "checkpoints")
    return step_of(found[-1]) if found else 0


def restart_reason(exit_code: int, *, is_complete: bool) -> str | None:
    """Return why the run ended, in words, if it must be restarted; else None.

    Args:
        exit_code: The exit code of the ``deepspeed`` command; negative when a signal ended it. It
            is that of the first rank that failed, as a byte: 247 is -9, SIGKILL.
        is_complete: Whether there is a checkpoint of the last step. The command ends with 0 also
            when the launcher that it started was killed.
    """
    if exit_code in (ExitCode.USER_ERROR, ExitCode.DIVERGED, ExitCode.PREEMPTED):
        return None
    if exit_code == ExitCode.FINISHED:
        return None if is_complete else "the launcher was killed"
    if exit_code == ExitCode.HUNG:
        return "hung"
    if exit_code == _SSH_FAILED:
        return "a host was lost"
    if exit_code < 0:
        signal = -exit_code
    else:  # srun returns 137 where deepspeed returns 247
        signal = 256 - exit_code if exit_code >= 192 else exit_code - 128
    if 0 < signal <= 64:
        who = "the launcher" if exit_code < 0 else "a rank"
        return f"{who} was ended by signal {signal}"
    return f"failed with exit code {exit_code}"


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of slots of each host, in the order of the file.

    Raises:
        ValueError: naming the file, the line and the rule it breaks.
    """
    try:
        lines = split_lines(read_text(path))
    except ValueError as error:
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
                f"{where} must have at least one slot: remove the line to leave {match[1]} out"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"hostfile ({path}) must name at least one host")
    return hosts


def select_slots(hosts: Mapping[str, int], include: str = "", exclude: str = "") -> Slots:
    """Return the slots that are included, or not excluded, written like DeepSpeed's options.

    Args:
        hosts: Number of slots by host.
        include: ``host@host:slot,slot``, or empty for all.
        exclude: Likewise; at most one of the two may be given.

    Raises:
        ValueError: for a host or slot that does not exist, and when no slot is left.
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
        raise ValueError(f"{option} ({text}) must leave at least one slot")
    return left


def format_slots(slots: Slots) -> str:
    """Return the slots as :func:`select_slots` and ``deepspeed --include`` read them."""
    return "@".join(f"{host}:{','.join(map(str, its))}" for host, its in slots.items())


def choose_hosts(config: Config, hosts: Slots, min_nodes: int = 1) -> Slots:
    """Return the slots for the most ranks that the layout and the batch allow on the hosts.

    The number of ranks must be a multiple of tp x pp x cp; their quotient, the data-parallel size,
    must divide the batch into whole micro-batches, and equal ``parallel.dp`` if that is set. Hosts
    are filled in order; the last one may get fewer ranks than it has slots, and hosts that get none
    are left out.

    Raises:
        ValueError: when no number of ranks fits, or when there are too few hosts.
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

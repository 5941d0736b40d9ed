"""The processes of a supervised run on this machine, as ``/proc`` shows them."""

from collections import defaultdict
from pathlib import Path

__all__ = ["below", "group_is_running", "is_running", "launcher_and_ranks"]


def below(process: int) -> list[int]:
    """All that a process has started, and what that has started, and so on."""
    children = defaultdict(list)
    for child, (parent, _) in _running().items():
        children[parent].append(child)
    found = list(children[process])
    for each in found:
        found += children[each]
    return found


def is_running(process: int) -> bool:
    """Whether it is there, and not a zombie that nobody has asked for."""
    return process in _running()


def launcher_and_ranks(process: int) -> tuple[int | None, list[int]]:
    """Below a process: the one that starts the ranks, if it is there yet, and the ranks.

    Data workers are forks of the ranks, by the same name: the ranks are the launcher's children.
    """
    for each in below(process):
        if b"deepspeed.launcher.launch" in _command(each):
            running = _running()
            children = [child for child, (parent, _) in running.items() if parent == each]
            ranks = [child for child in children if b"--local_rank=" in _command(child)]
            return each, sorted(ranks)
    return None, []


def _running() -> dict[int, tuple[int, int]]:
    """Parent and process group of every process but zombies."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(folder.name)] = (int(parent), int(group))
    return found


def group_is_running(leader: int) -> bool:
    """Whether any process of a process group is left."""
    return any(group == leader for _, group in _running().values())


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""

"""Runs that are killed: whom to kill, and what the run folder says afterwards."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path


def ranks_below(launcher: int) -> list[int]:
    """Processes that run the training script."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            commands[int(folder.name)] = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(parent)
    # The launcher's child starts the ranks; the ranks' children are their data workers.
    starters = [process for process, parent in parents.items() if parent == launcher]
    return [process for process, parent in parents.items() if parent in starters]


def losses(run: Path, name: str = "metrics.jsonl") -> dict[int, float]:
    records = map(json.loads, (run / name).read_text().splitlines())
    return {record["step"]: record["train/loss"] for record in records}


def batches(run: Path) -> tuple[dict[int, list[str]], set[tuple[int, int]]]:
    """Keys of every global batch, of steps done twice the later ones; starts with their ranks."""
    attempts: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    starts = set()
    for log in sorted((run / "samples").glob("rank-*.jsonl")):
        for line in log.read_text().splitlines():
            record = json.loads(line)
            attempts[record["start"]][record["step"]] += record["keys"]
            starts.add((record["start"], record["ranks"]))
    merged: dict[int, list[str]] = {}
    for start in sorted(attempts):
        merged.update(attempts[start])
    return merged, starts


def stands_beyond(run: Path, step: int) -> bool:
    """Whether a run that saves every 5 steps and logs all is between two saves, past a step."""
    logged = losses(run) if (run / "metrics.jsonl").exists() else {}
    return any(number > step and number % 5 == 2 for number in logged)


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)

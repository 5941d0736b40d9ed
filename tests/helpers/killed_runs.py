"""Run folders of runs that are killed, and what they hold."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path


def losses(run: Path, name: str = "metrics.jsonl") -> dict[int, float]:
    """Return the loss of every logged step."""
    records = map(json.loads, (run / name).read_text().splitlines())
    return {record["step"]: record["train/loss"] for record in records}


def batches(run: Path) -> tuple[dict[int, list[str]], set[tuple[int, int]]]:
    """Return the keys of every global batch, of steps done twice the later ones; and the starts, as
    pairs of first step and number of ranks."""
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
    """Return whether a run that saves every 5 steps stands between two saves, beyond a step."""
    logged = losses(run) if (run / "metrics.jsonl").exists() else {}
    return any(number > step and number % 5 == 2 for number in logged)


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds:.0f} s"
        time.sleep(0.02)

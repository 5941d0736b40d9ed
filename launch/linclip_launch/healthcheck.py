"""Whether the ranks of this host make steps: ``python -m linclip_launch.healthcheck RUNS_FOLDER``.

For the health checks of containers. Looks for signs of life that the watchdog of every rank writes
into ``<run folder>/watchdog``, of the run that was started last on this host.
Exit code 0 while every such rank entered a phase (waiting for data, computing loss and gradients,
saving ...) less than ``--phase-seconds`` ago and said so less than ``--sign-seconds`` ago; else 1,
and one line that says what is wrong. The standard library only: it is called every few seconds.
"""

import argparse
import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument(
        "--phase-seconds",
        type=float,
        default=900,
        help="longest phase of a healthy run; default %(default).0f, below the 1200 after which "
        "the watchdog itself ends a run",
    )
    parser.add_argument(
        "--sign-seconds",
        type=float,
        default=60,
        help="oldest sign of life; one is written every 10 seconds; default %(default).0f",
    )
    arguments = parser.parse_args()
    healthy, line = judge(
        signs_of_life(arguments.runs, socket.gethostname()),
        arguments.phase_seconds,
        arguments.sign_seconds,
    )
    print(line)
    return 0 if healthy else 1


def signs_of_life(runs: Path, host: str) -> list[dict[str, Any]]:
    """What the ranks of a host said last, those of the run that was started last."""
    found = []
    for path in runs.glob("*/watchdog/rank-*.json"):
        with contextlib.suppress(FileNotFoundError):  # its rank has just ended
            found.append(json.loads(path.read_text()))
    found = [sign for sign in found if sign["host"] == host]
    newest = max((sign["run"] for sign in found), default=None)
    return [sign for sign in found if sign["run"] == newest]


def judge(
    signs: list[dict[str, Any]], phase_seconds: float, sign_seconds: float
) -> tuple[bool, str]:
    """Whether all is well, and a line that says it."""
    if not signs:
        return False, f"no rank of this host ({socket.gethostname()}) has given a sign of life"
    now = time.time()
    for sign in signs:
        who = f"rank {sign['rank']} (pid {sign['pid']}), step {sign['step']}, {sign['phase']}"
        in_phase = now - sign["since"]
        silent = in_phase - sign["seconds"]  # "seconds" in its phase when it said so
        if silent > sign_seconds:
            return False, f"{who}: no sign of life for {silent:.0f} s"
        if in_phase > phase_seconds:
            return False, f"{who}: in this phase for {in_phase:.0f} s"
    steps = min(sign["step"] for sign in signs)
    return True, f"{len(signs)} ranks of this host are well, step {steps}"


if __name__ == "__main__":
    sys.exit(main())

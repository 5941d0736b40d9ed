"""Check that the ranks of this host make progress, for the health checks of containers:
``python -m linclip_launch.healthcheck RUNS_FOLDER``.

Reads the signs of life that the watchdog of every rank writes into ``<run folder>/watchdog``, those
of the run that was started last on this host. Exit code 0 while every rank entered its phase
(waiting for data, computing loss and gradients, saving ...) less than ``--phase-seconds`` ago and
gave a sign of life less than ``--sign-seconds`` ago; else 1. Prints one line with the reason. Uses
only the standard library, since it runs every few seconds.
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
    sign = "oldest sign of life; one is written every 10 seconds; default %(default).0f"
    parser.add_argument("--sign-seconds", type=float, default=60, help=sign)
    arguments = parser.parse_args()
    signs = signs_of_life(arguments.runs, socket.gethostname())
    is_healthy, line = check_health(signs, arguments.phase_seconds, arguments.sign_seconds)
    print(line)
    return 0 if is_healthy else 1


def signs_of_life(runs: Path, host: str) -> list[dict[str, Any]]:
    """Return the last sign of life of each rank on a host, of the run that was started last."""
    found = []
    for path in runs.glob("*/watchdog/rank-*.json"):
        with contextlib.suppress(FileNotFoundError):  # its rank has just ended
            found.append(json.loads(path.read_text()))
    found = [sign for sign in found if sign["host"] == host]
    newest = max((sign["run"] for sign in found), default=None)
    return [sign for sign in found if sign["run"] == newest]


def check_health(
    signs: list[dict[str, Any]], phase_seconds: float, sign_seconds: float
) -> tuple[bool, str]:
    """Return whether all ranks are healthy, and a line with the reason."""
    if not signs:
        return False, f"no rank of this host ({socket.gethostname()}) has given a sign of life"
    now = time.time()
    for sign in signs:
        who = f"rank {sign['rank']} (pid {sign['pid']}), step {sign['step']}, {sign['phase']}"
        in_phase = now - sign["since"]
        silent = in_phase - sign["seconds"]  # "seconds": the time in its phase at the sign of life
        if silent > sign_seconds:
            return False, f"{who}: no sign of life for {silent:.0f} s"
        if in_phase > phase_seconds:
            return False, f"{who}: in this phase for {in_phase:.0f} s"
    steps = min(sign["step"] for sign in signs)
    return True, f"{len(signs)} ranks of this host are well, step {steps}"


if __name__ == "__main__":
    sys.exit(main())

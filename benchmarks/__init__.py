"""Measurements that compare the project with its peers; run from the repository's root."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_linclip.provenance import device_name, folder_name, run_facts

__all__ = ["REPOSITORY", "benchmark_facts", "results_folder"]

REPOSITORY = Path(__file__).parents[1]


def results_folder(what: str, device: str) -> Path:
    """Return the folder that keeps the results of a benchmark on a device, "cuda" or "cpu"."""
    return REPOSITORY / "docs" / "results" / what / folder_name(device_name(device))


def benchmark_facts(
    device: str, measured: Sequence[str], packages: Sequence[str] = ("torch",)
) -> dict[str, str]:
    """Return :func:`~ds_linclip.provenance.run_facts`, with the command as a reader would type it.

    Args:
        device: "cuda" or "cpu".
        measured, packages: Arguments of ``run_facts``.
    """
    spec = sys.modules["__main__"].__spec__  # of what ``python -m`` has started
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    command = shlex.join(["python", *program, *sys.argv[1:]])
    return run_facts(device, command, measured=measured, packages=packages)

"""Measurements that compare the project with its peers; run from the repository's root."""

import argparse
import os
import pickle
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.provenance import device_name, folder_name, run_facts

__all__ = ["REPOSITORY", "BenchmarkParser", "benchmark_facts", "measure_on_ranks"]

REPOSITORY = Path(__file__).parents[1]


class BenchmarkParser(argparse.ArgumentParser):
    """Parser of a benchmark's command; every error is one line, and exit code 2.

    Args:
        what: Name of the measurement, and of the folder of its results.
        description: The docstring of the program.
        output: Name of the argument that names another folder, by position or as an option.
    """

    def __init__(self, what: str, description: str | None, output: str = "output") -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        default = f"default: docs/results/{what}/<device>"
        self._output = self.add_argument(output, type=Path, nargs="?", help=default)
        self._what = what

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def check_positive(self, arguments: argparse.Namespace, *names: str) -> None:
        """End the program when a number, or one of several, is not positive."""
        for name in names:
            value = getattr(arguments, name)
            least = min(value) if isinstance(value, list) else value
            if not least > 0:
                self.error(f"{name.replace('_', '-')} ({least}) must be positive")

    def begin(
        self,
        arguments: argparse.Namespace,
        device: str,
        measured: Sequence[str],
        packages: Sequence[str] = ("torch",),
    ) -> tuple[Path, dict[str, str]]:
        """Return the folder for the results, created, and the facts of a run that begins.

        Args:
            arguments: The parsed command line.
            device: "cuda" or "cpu".
            measured, packages: Arguments of :func:`~ds_linclip.provenance.run_facts`.
        """
        results = REPOSITORY / "docs" / "results" / self._what
        given: Path | None = getattr(arguments, self._output.dest)
        output = given or results / folder_name(device_name(device))
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
        except OSError as error:
            self.error(f"output ({output}) must be a folder one can write to: {error.strerror}")
        return output, benchmark_facts(device, measured, packages)


def measure_on_ranks(num_ranks: int, measure: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``measure(*arguments)`` returns on every rank; see :func:`run_ranks`."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(num_ranks, _keep_result, Path(folder), measure, *arguments)
        files = (Path(folder, str(rank)) for rank in range(num_ranks))
        return [pickle.loads(file.read_bytes()) for file in files]


def _keep_result(folder: Path, measure: Callable[..., Any], *arguments: Any) -> None:
    result = measure(*arguments)
    (folder / os.environ["RANK"]).write_bytes(pickle.dumps(result))


def benchmark_facts(
    device: str, measured: Sequence[str], packages: Sequence[str] = ("torch",)
) -> dict[str, str]:
    """Return the facts of a run that begins: versions, and the command as a reader would type it.

    Args:
        device: "cuda" or "cpu".
        measured, packages: Arguments of :func:`~ds_linclip.provenance.run_facts`.
    """
    spec = sys.modules["__main__"].__spec__  # of what ``python -m`` has started
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    command = shlex.join(["python", *program, *sys.argv[1:]])
    cores = len(os.sched_getaffinity(0))
    return {
        **run_facts(device, command, measured=measured, packages=packages),
        "cores": str(cores),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }

"""What one command of ``linclip`` is, and the option that most of them have."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Command", "add_out"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        summary: What it does, in one line.
        add_arguments: Adds its arguments to a parser.
        run: ``module:function`` that takes the parsed arguments, and returns the exit code or None.
        examples: Lines of a shell.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: str
    examples: str


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of the results"
    )

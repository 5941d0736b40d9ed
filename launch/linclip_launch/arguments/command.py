"""What one command of ``linclip`` is, the type of its paths, and the option that most have."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Command", "add_out", "path", "path_text"]


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


def path_text(text: str) -> str:
    """Return a path, or the name of something else, with ``~`` expanded: as in ``--out=~/x``, which
    few shells expand."""
    expanded = os.path.expanduser(text)
    if not expanded or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"({text}) must be a path, or begin with ./ before a ~")
    return expanded


def path(text: str) -> Path:
    """Return what :func:`path_text` does, as a Path."""
    return Path(path_text(text))


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="folder of the results"
    )

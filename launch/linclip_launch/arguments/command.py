"""What one command of ``linclip`` is, and what the words of its arguments may be."""

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Command",
    "add_out",
    "number",
    "path",
    "path_text",
    "positive_number",
    "share",
    "whole_number",
]


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


def path_text(word: str) -> str:
    """Return a path, or the name of something else; ``~`` is the home folder, as in ``--out=~/x``,
    which few shells expand."""
    expanded = os.path.expanduser(word)
    if not expanded or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"must be a path, with ./ before a ~, not {word!r}")
    return expanded


def path(word: str) -> Path:
    """Return what :func:`path_text` does, as a Path."""
    return Path(path_text(word))


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="folder of the results"
    )


def whole_number(least: int, *, alternative: str = "") -> Callable[[str], int]:
    """Return the type of an argument: a whole number that is not less than another one.

    Args:
        least: The smallest that is allowed.
        alternative: The end of the rule in messages, where the caller accepts something else too.
    """

    def parse(word: str) -> int:
        with suppress(ValueError):
            if (value := int(word)) >= least:
                return value
        rule = f"must be a whole number >= {least}{alternative}"
        raise argparse.ArgumentTypeError(f"{rule}, not {word!r}")

    return parse


def number(word: str) -> float:
    """Return a finite number that is not negative."""
    with suppress(ValueError):
        if 0 <= (value := float(word)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a number >= 0, not {word!r}")


def positive_number(word: str) -> float:
    """Return a finite number greater than 0."""
    with suppress(argparse.ArgumentTypeError):
        if (value := number(word)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a number > 0, not {word!r}")


def share(word: str) -> float:
    """Return a number between 0 and 1, both excluded."""
    with suppress(ValueError):
        if 0 < (value := float(word)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {word!r}")

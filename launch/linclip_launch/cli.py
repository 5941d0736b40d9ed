"""The command line ``linclip``; the commands are listed in :mod:`linclip_launch.arguments`.

Only the module of the chosen command is imported: ``--help`` answers at once.
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from linclip_launch.arguments import COMMANDS, GROUPS, Command

__all__ = ["main", "parse", "parsers"]

_USER_ERROR, _INTERRUPTED, _TERMINATED = 2, 130, 143
#: Package that may be missing -> the extra of this one that installs it.
_EXTRAS = {
    "markdown": "eval",
    "scipy": "eval",
    "sklearn": "eval",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, at which a command ends as after Ctrl-C, and removes what is unfinished."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with a hint at ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    It is 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM, each with one line. ``train`` and
    ``preflight`` handle these signals themselves.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt as end:
        is_terminated = isinstance(end, _Terminated)
        print("terminated" if is_terminated else "interrupted", file=sys.stderr, flush=True)
        return _TERMINATED if is_terminated else _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: object) -> NoReturn:
    raise _Terminated


def _run(words: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    options, command = parse(words)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for package in ("ds_linclip", "linclip_eval", "linclip_launch"):
        logging.getLogger(package).setLevel(logging.INFO)
    # Without a GPU they warn that there is none, which the commands say themselves if it matters.
    for library in ("torch.utils.cpp_extension", "DeepSpeed"):
        logging.getLogger(library).addFilter(lambda record: record.levelno >= logging.ERROR)
    module, _, function = command.run.partition(":")
    try:
        from ds_linclip.process.import_gc import gc_paused

        with gc_paused():
            run = getattr(importlib.import_module(module), function)
        return run(options) or 0
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed: pip install 'ds_linclip[{extra}]'")
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _INTERRUPTED
    except (ValueError, OSError) as error:
        return _fail(str(error))


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Command]:
    """Return the arguments of a command line, and its command.

    The arguments also hold ``words``, the command line itself. A wrong command line, ``--help`` and
    ``--version`` end the process.
    """
    found = parsers()
    name: tuple[str, ...] = ()
    for word in words:
        if name in COMMANDS:
            break
        if word.startswith("-"):
            found[name].parse_args([word])  # --help and --version end here
        if (*name, word) not in found:
            choices = [other[-1] for other in found if other and other[:-1] == name]
            near = difflib.get_close_matches(word, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(choices)}"
            found[name].error(f"unknown command {word!r}: {hint}")
        name = (*name, word)
    if name not in COMMANDS:
        found[name].print_help(sys.stderr)
        sys.exit(_USER_ERROR)
    options = found[name].parse_intermixed_args(words[len(name) :])
    options.words = list(words)
    return options, COMMANDS[name]


def print_completion(options: argparse.Namespace) -> None:
    """Print the script that completes commands and options in a shell."""
    import shtab

    print(shtab.complete(parsers()[()], options.shell))


def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Return the parsers of all commands and groups by their words; that of no words holds all."""
    root = _Parser(
        prog="linclip",
        description="Train CLIP with linear attention, score it, and prepare its data.",
        epilog="`linclip COMMAND --help` shows arguments and examples.",
    )
    root.add_argument("--version", action="version", version=f"ds_linclip {version('ds_linclip')}")
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {(): root}
    below: dict[tuple[str, ...], Any] = {
        (): root.add_subparsers(metavar="COMMAND", title="commands")
    }
    for name, command in COMMANDS.items():
        for length in range(1, len(name)):
            group = name[:length]
            if group not in below:
                parser = below[group[:-1]].add_parser(
                    group[-1], help=GROUPS[group], description=_sentence(GROUPS[group])
                )
                found[group] = parser
                below[group] = parser.add_subparsers(metavar="COMMAND", title="commands")
        examples = "\n".join(f"  {line}" for line in command.examples.splitlines())
        parser = below[name[:-1]].add_parser(
            name[-1],
            help=command.summary,
            description=_sentence(command.summary),
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(parser)
        found[name] = parser
    return found


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _fail(message: str) -> int:
    """Print an error on rank 0. The other ranks wait for it, since the launcher ends all of them
    once one has ended."""
    dist: Any = sys.modules.get("torch.distributed")
    is_together = dist is not None and dist.is_available() and dist.is_initialized()
    if not is_together or dist.get_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if is_together:
        dist.barrier()
    return _USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

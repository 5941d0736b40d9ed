"""Command line ``linclip-eval``: every evaluation is a subcommand."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: Command -> module of this package with its ``main``, and what it does.
_COMMANDS = {
    "zero-shot": ("zero_shot_command", "classify images by the names of their classes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand over to a subcommand; returns the exit code."""
    what = "\n".join(f"  {name:<14} {text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="linclip-eval",
        description=f"Evaluate models of ds_linclip and open_clip.\n\ncommands:\n{what}",
        epilog="`linclip-eval COMMAND --help` tells more. Over several processes or nodes: "
        "`deepspeed launch/eval.py COMMAND ...`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("command", choices=tuple(_COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # Imported where it is needed: torch takes seconds. On a machine without a GPU it may warn that
    # it finds none; nothing here looks for one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    module, _ = _COMMANDS[options.command]
    return int(importlib.import_module(f"linclip_eval.{module}").main(options.arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Command line ``linclip-eval``: every evaluation is a subcommand."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from ds_linclip.process.import_gc import gc_paused

__all__ = ["main"]

#: Command -> what it does. Its ``main`` is in the module of that name in ``linclip_eval.commands``.
_COMMANDS = {
    "zero-shot": "classify images by the names of their classes",
    "retrieval": "find the captions of images and the images of captions",
    "probe": "linear probe and nearest neighbours on frozen features",
    "resolution": "zero-shot accuracy and cost over image sizes and data sets",
    "runtime": "time and memory over the number of tokens",
    "scaling-laws": "loss and error over compute, from run folders",
    "diagnostics": "attention statistics of every layer",
    "report": "one page with the results of the other commands",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, or 2 for bad input."""
    commands = "\n".join(f"  {name:<14} {text}" for name, text in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="linclip-eval",
        description=f"Evaluate models of ds_linclip and open_clip.\n\ncommands:\n{commands}",
        epilog="`linclip-eval COMMAND --help` lists the options of a command. To use several "
        "processes or nodes: `deepspeed --module linclip_launch.eval COMMAND ...`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the launcher
    parser.add_argument("command", choices=tuple(_COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the command")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # torch may warn that a machine without a GPU has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with gc_paused():  # only the chosen command is imported: torch takes seconds
        module = options.command.replace("-", "_")
        command = importlib.import_module(f"linclip_eval.commands.{module}")
    try:
        command.main(options.arguments)
    except (ValueError, OSError) as error:
        _print_from_rank_zero(f"error: {error}")
        return 2
    return 0


def _print_from_rank_zero(message: str) -> None:
    """Print on rank 0; the others wait, since the launcher kills all ranks when one exits."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main())

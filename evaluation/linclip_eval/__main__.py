"""Command line ``linclip-eval``: every evaluation is a subcommand."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from ds_linclip.process.import_gc import quick_start

__all__ = ["main"]

#: Command -> module of linclip_eval.commands with its ``main``, and what it does.
_COMMANDS = {
    "zero-shot": ("zero_shot", "classify images by the names of their classes"),
    "retrieval": ("retrieval", "find texts of images and images of texts"),
    "probe": ("probe", "linear probe and nearest neighbours on frozen features"),
    "resolution": (
        "resolution",
        "zero-shot accuracy and cost over image sizes and domains",
    ),
    "runtime": ("runtime", "time and memory over the number of tokens"),
    "scaling-laws": ("scaling_laws", "loss and error over compute, from run folders"),
    "diagnostics": ("diagnostics", "what attention does, layer by layer"),
    "report": ("report", "one page of the results of the others"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, or 2 for bad input."""
    what = "\n".join(f"  {name:<14} {text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="linclip-eval",
        description=f"Evaluate models of ds_linclip and open_clip.\n\ncommands:\n{what}",
        epilog="`linclip-eval COMMAND --help` tells more. Over several processes or nodes: "
        "`deepspeed --module linclip_launch.eval COMMAND ...`.",
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
    name, _ = _COMMANDS[options.command]
    with quick_start():
        command = importlib.import_module(f"linclip_eval.commands.{name}")
    try:
        command.main(options.arguments)
    except (ValueError, OSError) as error:
        _say_once(f"error: {error}")
        return 2
    return 0


def _say_once(message: str) -> None:
    """Rank 0 speaks for all; none leaves before it has, since the launcher then ends the rest."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main())

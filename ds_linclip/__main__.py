"""Command line ``ds-linclip``: every tool is a subcommand."""

import argparse
import logging
import sys
from collections.abc import Sequence

from ds_linclip.process.import_gc import gc_paused

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand over to a subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ds-linclip",
        description="Tools around training.",
        epilog="`ds-linclip COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=("make-shards", "inspect-shards", "export", "import"),
        help="make-shards: write a data set as shards; inspect-shards: report what shards hold; "
        "export: write a checkpoint for open_clip; import: open_clip's weights for init.pretrained",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the subcommand")
    options = parser.parse_args(arguments)
    # Imported where it is needed: torch takes seconds. On a machine without a GPU it may warn that
    # it finds none; nothing here looks for one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with gc_paused():
        if options.command == "make-shards":
            from ds_linclip.data.prepare.make_shards import main as run
        elif options.command == "inspect-shards":
            from ds_linclip.data.prepare.inspect_shards import main as run
        elif options.command == "export":
            from ds_linclip.interop.export import main as run
        else:
            from ds_linclip.interop.import_weights import main as run
    return run(options.arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The command line ``ds-linclip``: data and weight tools as subcommands."""

import argparse
import logging
import sys
from collections.abc import Sequence

from ds_linclip.process.import_gc import gc_paused

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="ds-linclip",
        description="Tools for data sets and weights.",
        epilog="See `ds-linclip COMMAND --help` for the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=("make-shards", "inspect-shards", "export", "import"),
        help="make-shards: write a data set as shards; inspect-shards: report what is in shards; "
        "export: convert a checkpoint for open_clip; import: convert open_clip's weights for "
        "init.pretrained",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the subcommand")
    options = parser.parse_args(arguments)
    # Imported here because torch takes seconds. On a machine without a GPU it may warn about that,
    # which does not matter for these tools.
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

"""The progress bar of everything that takes long."""

import sys
from typing import IO, Any

from tqdm import tqdm

__all__ = ["progress"]

#: Seconds between the lines that are written where nothing can be redrawn.
SECONDS_PER_LINE = 30.0


class _Lines:
    """A stream to which a bar's redraws go as lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def progress(*arguments: Any, **options: Any) -> tqdm:
    """Return a bar of tqdm: redrawn on a terminal, a line every half minute in a file.

    Args:
        arguments, options: Those of :class:`tqdm.tqdm`.
    """
    if not sys.stderr.isatty():
        every = SECONDS_PER_LINE
        options = {"mininterval": every, "maxinterval": every, "ncols": 100, **options}
        options["file"] = _Lines(sys.stderr)
    return tqdm(*arguments, **options)

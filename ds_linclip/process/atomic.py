"""Files and folders that readers see whole or not at all, whenever the writer is killed."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["atomic_directory", "atomic_file", "sync", "write_atomically"]


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to; rename it to ``path`` when the context ends without an error.

    The temporary file lies beside ``path`` under a name of its own, so several processes may write
    the same file: the last one wins. It is removed when the context raises.

    Args:
        path: The file to create or replace.
        durable: Whether content and rename survive a power cut (fsync of file and folder).

    Raises:
        OSError: when the file cannot be written or renamed.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a whole file as :func:`atomic_file`; text is encoded in UTF-8.

    Names of files that are not UTF-8 keep their bytes.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    with atomic_file(path, durable=durable) as partial:
        partial.write_bytes(content)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder; rename it to ``path`` when the context ends without an error.

    Its parent folders are created; it is removed when the context raises.

    Args:
        path: A folder that does not exist, or an empty one.

    Raises:
        OSError: when the folder cannot be written, or when ``path`` holds files by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        # A second Ctrl-C waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        shutil.rmtree(partial, ignore_errors=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The checks of the folder that all ranks write their checkpoints into.

The preflight and every start of training make them.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.preflight.node_checks import checkpoint_size
from ds_linclip.preflight.verdicts import format_gib, seconds_of

__all__ = ["check_run_folder", "read_probes", "write_probe"]

_FILE_SIZE = 2**20  # bytes that every rank writes
#: Seconds in which a file server may still answer from what it knew before a file was written.
_VISIBLE_WITHIN = 30.0


def check_run_folder(config: Config, mesh: Mesh) -> None:
    """Check that the run folder has room for a checkpoint, and that all ranks write and see it.

    Raises:
        AgreedError: on all ranks, when one of them does not.
    """
    folder = config.run_dir / "checkpoints" / f"probe-{uuid.uuid4().hex}.tmp"
    folder = mesh.from_rank_zero(lambda: _create(folder, checkpoint_size(config)))
    hosts, ranks = mesh.gather_all(socket.gethostname()), range(mesh.world_size)
    try:
        mesh.agree(partial(write_probe, folder, hosts, mesh.rank))
        mesh.agree(partial(read_probes, folder, hosts, mesh.rank, ranks), (ValueError, OSError))
    finally:
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _create(folder: Path, needed: int) -> Path:
    """Create a folder on a disk with room for ``needed`` bytes, and return it."""
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{folder.parent} cannot be written: {error}") from error
    if free < needed:
        folder.rmdir()
        raise ValueError(
            f"{folder.parent} must have room for a checkpoint of {format_gib(needed)}: "
            f"{format_gib(free)} are free; free more, or choose another output_dir"
        )
    return folder


def write_probe(folder: Path, hosts: Sequence[str], rank: int) -> float:
    """Write this rank's file; return the seconds until it is on the disk."""
    try:
        # The folder is not created here: on another storage that would hide the difference.
        with _file_of(folder, rank).open("xb") as file:
            file.write(_content_of(hosts, rank))
            file.flush()
            return seconds_of(partial(os.fsync, file.fileno()))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}, which {hosts[0]} has created, is not there") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error


def read_probes(folder: Path, hosts: Sequence[str], rank: int, writers: Sequence[int]) -> None:
    """Wait until the files of all writers are visible, and read that of the next host.

    Raises:
        ValueError: naming the hosts whose files are not seen, or differ.
    """
    until = time.monotonic() + _VISIBLE_WITHIN
    while True:
        names = {path.name for path in folder.iterdir()}
        unseen = [each for each in writers if _file_of(folder, each).name not in names]
        if not unseen:
            break
        if time.monotonic() > until:
            missing = ", ".join(dict.fromkeys(hosts[each] for each in unseen))
            raise ValueError(f"{folder}: files of {missing} not seen after {_VISIBLE_WITHIN:.0f} s")
        time.sleep(0.1)
    others = [each for each in writers if hosts[each] != hosts[rank]]
    other = min((each for each in others if each > rank), default=(others or [rank])[0])
    if _file_of(folder, other).read_bytes() != _content_of(hosts, other):
        raise ValueError(f"{folder}: a file reads otherwise than {hosts[other]} has written it")


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


def _content_of(hosts: Sequence[str], rank: int) -> bytes:
    line = f"rank {rank} of {hosts[rank]}\n".encode()
    return line * (_FILE_SIZE // len(line))

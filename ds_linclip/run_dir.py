"""The run folder: one run at a time works in it, and every start is written down there."""

import errno
import fcntl
import getpass
import json
import logging
import os
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from ds_linclip.config import Config, save_config
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.provenance import software

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)

#: What there is of a run from its first moments on.
_LOCK, _CONFIG = "lock", "config.yaml"
#: One of these, and the folder is a run's.
_OF_A_RUN = (_CONFIG, "checkpoints")
#: What there may be before: of a start that was cut off, of the watchdog, the supervisor and wandb.
_BEFORE_A_RUN = (_LOCK, f"{_CONFIG}.tmp", "watchdog", "hang", "restarts.jsonl", "hostfile", "wandb")
#: Where launchers write what a run says.
_LOGS = {".log", ".out", ".err"}
#: Seconds in which a file server learns that the node of a lock is dead.
_LEASE = 180.0
#: Answers of file systems that keep no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
#: What results depend on bit for bit.
_COMPARED = ("torch", "triton", "deepspeed")


class RunFolder:
    """The folder of one run, held by it; all ranks call every method together.

    Args:
        config, mesh: of the run.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.path = config.run_dir
        self._config = config
        self._mesh = mesh

    @classmethod
    @contextmanager
    def hold(cls, config: Config, mesh: Mesh) -> Iterator["RunFolder"]:
        """Make the folder where there is none, and keep other runs out of it within the context.

        Rank 0 holds a POSIX record lock on the file ``lock``. It ends with the process however that
        ends, and processes started by this one have no part in it. The file stays.

        Raises:
            AgreedError: on all ranks, with nothing changed, when another run holds the folder, when
                the folder holds files of something else, or when it cannot be written.
        """
        folder = cls(config, mesh)
        file: IO[str] | None = None
        problem: str | None = None
        if mesh.rank == 0:
            file, problem = folder._take()
        problem = mesh.from_rank_zero(lambda: problem)
        if problem is not None:
            raise AgreedError(problem)
        try:
            yield folder
        finally:
            if file is not None:
                file.close()

    def record_start(self, resume_from: Path | None) -> None:
        """Write down what this start is: ``config.yaml``, ``deepspeed.json``, ``starts.jsonl``.

        The first two are those of the latest start; the third has a line for every start, with the
        config, versions, git commit, machines and command line.

        Args:
            resume_from: the checkpoint it goes on from.

        Raises:
            AgreedError: when the folder cannot be written.
        """
        facts = _facts(self._config, self._mesh, resume_from)
        self._mesh.from_rank_zero(lambda: self._write(facts))

    def _take(self) -> tuple[IO[str] | None, str | None]:
        """The locked file, or what is in the way."""
        try:
            problem = self._strangers()
            if problem is not None:
                return None, problem
            self.path.mkdir(parents=True, exist_ok=True)
            path = self.path / _LOCK
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as error:
            return None, self._unwritable(error)
        try:
            holder = _lock(file, path)
            if holder is not None:
                file.close()
                return None, (
                    f"run folder ({self.path}) is in use by {holder}: stop that run, or choose "
                    "another name or output_dir"
                )
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                return None, self._unwritable(error)
            logger.warning(
                "%s cannot be locked here (%s): nothing keeps a second run out of this folder",
                path,
                error.strerror,
            )
        try:
            file.seek(0)
            file.truncate()
            file.write(_holder() + "\n")
            file.flush()
        except OSError as error:
            file.close()
            return None, self._unwritable(error)
        return file, None

    def _strangers(self) -> str | None:
        """What is wrong with the folder's content, in words."""
        if self.path.exists() and not self.path.is_dir():
            return f"run folder ({self.path}) is a file: choose another name or output_dir"
        names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        if any(name in _OF_A_RUN for name in names):
            return None
        others = [
            name for name in names if name not in _BEFORE_A_RUN and Path(name).suffix not in _LOGS
        ]
        if not others:
            return None
        return (
            f"run folder ({self.path}) holds files of something else ({others[0]}): choose another "
            "name or output_dir"
        )

    def _write(self, facts: dict[str, Any]) -> None:
        starts = self.path / "starts.jsonl"
        try:
            before = _last_record(starts)
            partial = self.path / f"{_CONFIG}.tmp"
            save_config(self._config, partial)
            os.replace(partial, self.path / _CONFIG)
            generated = json.dumps(facts["deepspeed_config"], indent=1)
            (self.path / "deepspeed.json").write_text(generated)
            _append(starts, json.dumps(facts))
        except OSError as error:
            raise ValueError(self._unwritable(error)) from error
        if before is not None:
            _warn_of_other_versions(before, facts)

    def _unwritable(self, error: OSError) -> str:
        return f"output_dir ({self._config.output_dir}) cannot be written: {error}"


def _lock(file: IO[str], path: Path) -> str | None:
    """Lock a file; who holds it if that cannot be done.

    A holder on another host may be dead without the file server's knowledge, until its lease ends:
    a run that is started again after the loss of a node waits for that.
    """
    until = time.monotonic() + _LEASE
    is_told = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        else:
            return None
        file.seek(0)
        holder = file.read().strip() or "another process"
        is_here = holder.startswith(f"host {socket.gethostname()},")
        if is_here or time.monotonic() >= until:
            return holder
        if not is_told:
            logger.warning("waiting %.0f s for %s to let go of %s", _LEASE, holder, path)
            is_told = True
        time.sleep(1)


def _holder() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        user = str(os.getuid())
    return f"host {socket.gethostname()}, pid {os.getpid()}, user {user}, since {_now()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _facts(config: Config, mesh: Mesh, resume_from: Path | None) -> dict[str, Any]:
    """All that is known of this start."""
    gpu = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None
    mine = (socket.gethostname(), gpu or platform.processor() or platform.machine())
    places = [mine] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(places, mine)
    return {
        "time": _now(),
        "resumed_from": None if resume_from is None else resume_from.name,
        "command": sys.argv,
        **software(mesh.device),
        "device": str(mesh.device),
        "hosts": Counter(host for host, _ in places),
        "devices": Counter(name for _, name in places),
        "world_size": mesh.world_size,
        "layout": {axis: getattr(mesh, axis).size for axis in ("dp", "tp", "pp", "cp")},
        "config": asdict(config),
        "deepspeed_config": deepspeed_config(config, mesh),
    }


def _last_record(path: Path) -> dict[str, Any] | None:
    """The last whole line; a kill may have torn the one after it."""
    lines: Sequence[str] = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None


def _append(path: Path, line: str) -> None:
    """Add a line, on a new line also where the last one was torn."""
    content = path.read_bytes() if path.exists() else b""
    torn = "\n" if content and not content.endswith(b"\n") else ""
    with path.open("a") as file:
        file.write(f"{torn}{line}\n")


def _warn_of_other_versions(before: dict[str, Any], facts: dict[str, Any]) -> None:
    changed = [
        f"{name} {before.get(name)} -> {facts[name]}"
        for name in _COMPARED
        if before.get(name) != facts[name]
    ]
    if changed and facts["resumed_from"] is not None:
        logger.warning(
            "resumed with other versions than at the start before (%s): losses may differ from "
            "those of an uninterrupted run",
            ", ".join(changed),
        )

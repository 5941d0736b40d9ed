"""The run folder: one run at a time uses it, and every start is recorded in it."""

import errno
import fcntl
import getpass
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ds_linclip.config import Config, config_as_yaml
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.atomic import write_atomically
from ds_linclip.provenance import device_name, software

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)

_LOCK, _CONFIG = "lock", "config.yaml"
#: A folder that holds one of these is a run folder.
_RUN_FILES = (_CONFIG, "checkpoints")
#: Names that a folder may hold before its run starts: the remains of an interrupted start, and
#: files of the watchdog, the supervisor and the trackers.
_ALLOWED_FILES = (_LOCK, "watchdog", "hang", "restarts.jsonl", "hostfile", "wandb", "tracker_id")
#: Suffixes of files to which launchers write a run's output, and of unfinished files.
_ALLOWED_SUFFIXES = {".log", ".out", ".err", ".tmp"}
#: Seconds in which a file server learns that the node of a lock is dead.
_LEASE = 180.0
#: Errors of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
#: Versions on which results depend bit for bit.
_COMPARED = ("torch", "triton", "deepspeed")


class RunFolder:
    """The folder of one run, locked by it; all ranks of the mesh call every method together."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.path, self._config, self._mesh = config.run_dir, config, mesh

    @classmethod
    @contextmanager
    def hold(cls, config: Config, mesh: Mesh) -> Iterator["RunFolder"]:
        """Create the folder if it does not exist, and keep other runs out of it in this context.

        Rank 0 holds a POSIX record lock on the file ``lock``. The lock ends with the process,
        however that ends; child processes do not inherit it. The file stays.

        Raises:
            AgreedError: on all ranks, with nothing changed, when another run holds the folder, when
                the folder holds files of something else, or when it cannot be written.
        """
        folder = cls(config, mesh)
        file = mesh.agree(lambda: folder._take() if mesh.rank == 0 else None)
        try:
            yield folder
        finally:
            if file is not None:
                file.close()

    def record_start(self, resume_from: Path | None) -> None:
        """Write ``config.yaml`` and ``deepspeed.json``, and add a line to ``starts.jsonl``.

        The first two describe the latest start; the third has a line for every start, with the
        config, versions, git commit, machines, command line and the checkpoint it resumes from.

        Raises:
            AgreedError: when the folder cannot be written.
        """
        facts = _facts(self._config, self._mesh, resume_from)
        self._mesh.from_rank_zero(lambda: self._write(facts))

    def _take(self) -> IO[str]:
        """Lock the folder and return the open lock file; ValueError when it cannot be used."""
        with ExitStack() as on_error:
            try:
                self._check_content()
                self.path.mkdir(parents=True, exist_ok=True)
                file = on_error.enter_context((self.path / _LOCK).open("a+"))
                self._lock(file)
                file.truncate(0)
                file.write(_holder() + "\n")
                file.flush()
            except OSError as error:
                raise ValueError(self._unwritable(error)) from error
            on_error.pop_all()
        return file

    def _lock(self, file: IO[str]) -> None:
        """Lock a file, unless its file system has no locks.

        A holder on another host may be dead without the file server's knowledge, until its lease
        ends: a run that is started again after the loss of a node waits for that.

        Raises:
            ValueError: when another process holds the lock.
            OSError: when the file cannot be locked or read.
        """
        deadline, is_waiting = time.monotonic() + _LEASE, False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    logger.warning(
                        "%s cannot be locked here (%s): nothing keeps a second run out of it",
                        *(self.path, error.strerror),
                    )
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            is_here = holder.startswith(f"host {socket.gethostname()},")
            if is_here or time.monotonic() >= deadline:
                raise ValueError(
                    f"run folder ({self.path}) is in use by {holder}: stop that run, or choose "
                    "another name or output_dir"
                )
            if not is_waiting:
                logger.warning("waiting %.0f s for %s to release %s", _LEASE, holder, self.path)
                is_waiting = True
            time.sleep(1)

    def _check_content(self) -> None:
        where, advice = f"run folder ({self.path})", "choose another name or output_dir"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{where} is a file: {advice}")
        names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        if any(name in _RUN_FILES for name in names):
            return
        for name in names:
            if name not in _ALLOWED_FILES and Path(name).suffix not in _ALLOWED_SUFFIXES:
                raise ValueError(f"{where} holds files of something else ({name}): {advice}")

    def _write(self, facts: dict[str, Any]) -> None:
        starts = self.path / "starts.jsonl"
        try:
            before = _last_record(starts)
            write_atomically(self.path / _CONFIG, config_as_yaml(self._config))
            generated = json.dumps(facts["deepspeed_config"], indent=1)
            write_atomically(self.path / "deepspeed.json", generated)
            _append(starts, json.dumps(facts))
        except OSError as error:
            raise ValueError(self._unwritable(error)) from error
        if before is not None:
            _warn_of_other_versions(before, facts)

    def _unwritable(self, error: OSError) -> str:
        return f"output_dir ({self._config.output_dir}) cannot be written: {error}"


def _holder() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        user = str(os.getuid())
    return f"host {socket.gethostname()}, pid {os.getpid()}, user {user}, since {_now()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _facts(config: Config, mesh: Mesh, resume_from: Path | None) -> dict[str, Any]:
    """Return the record of this start; a collective of all ranks."""
    places = mesh.gather_all((socket.gethostname(), device_name(mesh.device.type)))
    return {
        "time": _now(),
        "resumed_from": _shown(config, resume_from),
        "command": sys.argv,
        **software(mesh.device),
        "device": str(mesh.device),
        "hosts": Counter(host for host, _ in places),
        "devices": Counter(name for _, name in places),
        "world_size": mesh.world_size,
        "layout": mesh.axis_sizes,
        "config": asdict(config),
        "deepspeed_config": deepspeed_config(config, mesh),
    }


def _shown(config: Config, checkpoint: Path | None) -> str | None:
    """Return the name of a checkpoint of the run, or the path of another run's."""
    if checkpoint is None:
        return None
    is_own = checkpoint.parent == config.run_dir / "checkpoints"
    return checkpoint.name if is_own else str(checkpoint)


def _last_record(path: Path) -> dict[str, Any] | None:
    """Return the last complete line; a kill may have cut off the one after it."""
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                return record
    return None


def _append(path: Path, line: str) -> None:
    """Append a line, after a line break if a kill has cut off the last one."""
    content = path.read_bytes() if path.exists() else b""
    torn = "\n" if content and not content.endswith(b"\n") else ""
    with path.open("a") as file:
        file.write(f"{torn}{line}\n")


def _warn_of_other_versions(before: dict[str, Any], facts: dict[str, Any]) -> None:
    names = [name for name in _COMPARED if before.get(name) != facts[name]]
    if names and facts["resumed_from"] is not None:
        logger.warning(
            "resumed with other versions than at the start before (%s): losses may differ from "
            "those of an uninterrupted run",
            ", ".join(f"{name} {before.get(name)} -> {facts[name]}" for name in names),
        )

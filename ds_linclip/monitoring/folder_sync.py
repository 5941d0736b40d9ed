"""A copy of the run folder in another place, kept up to date while training continues."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.core import url_to_fs

from ds_linclip.checkpoint.directory import committed
from ds_linclip.config import Config
from ds_linclip.data.remote import redact
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.phase import PhaseTracker

__all__ = ["FolderSync", "synced"]

logger = logging.getLogger(__name__)

#: Entries of a run folder that belong to this machine.
_LEFT_OUT = {"lock", "wandb"}
_UNFINISHED = (".tmp", ".rejected")
#: The file that makes a copied checkpoint complete, and thus comes last.
_MANIFEST = "manifest.json"


@contextmanager
def synced(config: Config, mesh: Mesh, phases: PhaseTracker) -> Iterator[None]:
    """Copy the run folder to ``log.sync_to`` from time to time in this context, and at its end.

    Rank 0 copies, in a thread of its own. A failure is logged and counted, and does not end the
    run.

    Raises:
        AgreedError: on all ranks, at the start, when nothing can be written there.
    """
    is_here = config.log.sync_to is not None and mesh.rank == 0
    sync = mesh.agree(lambda: FolderSync(config) if is_here else None)
    if sync is None:
        yield
        return
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(60 * config.log.sync_minutes):
            sync.copy(stop.is_set)

    thread = threading.Thread(target=work, name="sync", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        phases.enter("copying the run folder")
        thread.join()
        is_whole = sync.copy(lambda: phases.enter("copying the run folder"))
        level, end = (
            (logging.INFO, "is complete") if is_whole else (logging.ERROR, "is NOT complete")
        )
        found = f"the copy in {sync.place} {end}: {sync.files} files copied by this start"
        logger.log(level, "log.sync_to: %s, %d failures", found, sync.failures)


class FolderSync:
    """Copies what is new in a run folder.

    Attributes:
        place: The URL of the copy, without secrets.
        files: Number of files that were copied.
        failures: Number of copies that have failed.

    Raises:
        ValueError: when nothing can be written there.
    """

    def __init__(self, config: Config) -> None:
        url = f"{config.log.sync_to}".rstrip("/")
        self._folder, self._url = config.run_dir, url
        self.place = f"{redact(url)}/{config.name}"
        self.files = self.failures = 0
        self._copied: dict[str, tuple[int, int]] = {}  # path -> size and time of change
        self._complete: set[str] = set()  # names of checkpoints
        self._made: set[str] = set()
        try:
            self._files, root = url_to_fs(url, skip_instance_cache=True)
            self._root = f"{root.rstrip('/')}/{config.name}"
            self._make(self._root)
            self._files.pipe_file(f"{self._root}/copied_from", f"{self._folder}\n".encode())
        except Exception as error:
            raise ValueError(
                f"log.sync_to ({redact(url)}) must be a place to write to: {self._reason(error)}"
            ) from error

    def copy(self, on_file: Callable[[], bool | None]) -> bool:
        """Copy what is new; return whether all of it is there.

        Args:
            on_file: Called before every file; True: leave the rest for the next time.
        """
        try:
            for path in self._new_files():
                if on_file():
                    return False
                self._copy_file(path)
        except Exception as error:  # noqa: BLE001 - file systems raise what they like
            self.failures += 1
            logger.warning("log.sync_to (%s): not copied: %s", self.place, self._reason(error))
            return False
        return True

    def _new_files(self) -> Iterator[Path]:
        """Yield complete checkpoints first, then what is written all the time."""
        for checkpoint in committed(self._folder / "checkpoints"):
            if checkpoint.name in self._complete or self._is_there(checkpoint / _MANIFEST):
                self._complete.add(checkpoint.name)
                continue
            names = sorted(each.name for each in checkpoint.glob("*") if each.name != _MANIFEST)
            yield from (checkpoint / name for name in [*names, _MANIFEST])
            if checkpoint.is_dir():  # not removed meanwhile
                self._complete.add(checkpoint.name)
        for folder, folders, names in os.walk(self._folder):
            folders[:] = sorted(
                each for each in folders if not self._is_left_out(Path(folder) / each)
            )
            for path in sorted(Path(folder) / name for name in names):
                if not self._is_left_out(path) and self._is_changed(path):
                    yield path

    def _is_left_out(self, path: Path) -> bool:
        is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step-")
        is_unfinished = path.suffix in _UNFINISHED or path.name.startswith("unfinished-")
        is_own = path.parent == self._folder and path.name in _LEFT_OUT
        return is_checkpoint or is_unfinished or is_own

    def _is_changed(self, path: Path) -> bool:
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        return self._copied.get(str(path)) != (status.st_size, status.st_mtime_ns)

    def _copy_file(self, path: Path) -> None:
        """Copy a file, unless it has been removed meanwhile."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        target = self._target(path)
        self._make(target.rpartition("/")[0])
        self._files.put_file(str(path), target)
        self._copied[str(path)] = status.st_size, status.st_mtime_ns
        self.files += 1

    def _is_there(self, path: Path) -> bool:
        self._files.invalidate_cache()
        return bool(self._files.exists(self._target(path)))

    def _target(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self._folder).as_posix()}"

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            self._files.makedirs(folder, exist_ok=True)
            self._made.add(folder)

    def _reason(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}".replace(self._url, redact(self._url))
        return " ".join(text.split())

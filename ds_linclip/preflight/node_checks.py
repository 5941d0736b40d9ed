"""What one rank finds on its host: software, devices, room, data, a folder that all share."""

import os
import shutil
import tarfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_linclip.config import Config
from ds_linclip.data import Storage, find_shards
from ds_linclip.data.remote import redact
from ds_linclip.data.shard_index import expand
from ds_linclip.model.flops import num_parameters, num_state_values
from ds_linclip.parallel.mesh import select_device
from ds_linclip.provenance import software

__all__ = [
    "Machine",
    "Shards",
    "Space",
    "WriteTest",
    "count_shards",
    "free_space",
    "look_at_machine",
    "open_first_shards",
]

_WRITTEN = 2**20  # bytes of every rank's file
#: Seconds in which a file server may still answer from what it knew before a file was written.
_VISIBLE_WITHIN = 30.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Of one rank's host.

    Attributes:
        software: As :func:`~ds_linclip.provenance.software`.
        device: Of this rank.
        devices: Names of the GPUs of this host with their GiB; empty for ranks on the CPU.
        num_cores: That this rank may use.
        memory: Bytes of the host.
    """

    software: Mapping[str, str | None]
    device: torch.device
    devices: Sequence[str]
    num_cores: int
    memory: int


def look_at_machine(config: Config) -> Machine:
    """Raises ValueError when this host has fewer GPUs than ranks."""
    device = select_device(config.parallel)
    gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    properties = [torch.cuda.get_device_properties(gpu) for gpu in gpus]
    return Machine(
        software=software(device),
        device=device,
        devices=[f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in properties],
        num_cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


@dataclass(frozen=True, kw_only=True)
class Space:
    """Room for something on a disk.

    Attributes:
        path: The folder, or the nearest one above that is there.
        free, needed: Bytes.
        why: How ``needed`` comes about.
    """

    path: str
    free: int
    needed: int
    why: str


def free_space(config: Config) -> dict[str, Space]:
    """Room for "checkpoints", for the "cache" if the config has one, and in "/dev/shm"."""
    checkpoint = 4 * num_state_values(config.optim) * num_parameters(config.model, config.loss)
    count = _num_checkpoints(config)
    there = _bytes_below(config.run_dir / "checkpoints")
    why = f"{count} checkpoints of {checkpoint / 2**30:.3g} GiB"
    if there:
        why += f" less {there / 2**30:.3g} GiB that are there"
    spaces = {"checkpoints": _space(config.run_dir, max(0, count * checkpoint - there), why)}
    cache = config.data.cache
    if cache.dir is not None:
        needed = int(cache.max_gib * 2**30)
        why = f"data.cache.max_gib ({cache.max_gib:g}) less copies that are there"
        path = Path(cache.dir).expanduser()
        spaces["cache"] = _space(path, max(0, needed - _bytes_below(path)), why)
    why = "DeepSpeed's and NCCL's least; data workers hand batches on through it"
    spaces["/dev/shm"] = _space(Path("/dev/shm"), 2**29, why)
    return spaces


def _num_checkpoints(config: Config) -> int:
    """How many there will be at most: those kept, one being written, those kept for ever."""
    steps, checkpoint = config.train.steps, config.checkpoint
    saves = steps if checkpoint.every_minutes else 1
    if checkpoint.every_steps:
        saves = max(saves, -(-steps // checkpoint.every_steps))
    forever = steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    return min(saves, checkpoint.keep_last + 1 + forever)


def _space(path: Path, needed: int, why: str) -> Space:
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    return Space(path=str(there), free=free, needed=needed, why=why)


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run that goes on removes old ones
            found += path.stat().st_size if path.is_file() else 0
    return found


@dataclass(frozen=True)
class Shards:
    """How many ``data.train`` names, of how many sources, with how many samples."""

    num_sources: int
    num_shards: int
    num_samples: int


def count_shards(config: Config) -> Shards:
    """Find all shards as training does at its start; raises ValueError for any that is missing."""
    storage = Storage(config.data.cache, config.data.network)
    groups = find_shards(config.data.train, storage)
    shards = [shard for group in groups for shard in group.shards]
    samples = sum(shard.num_samples for shard in shards)
    return Shards(len(config.data.train), len(shards), samples)


def open_first_shards(config: Config) -> float:
    """Read the head of the first shard of every source; seconds for the slowest.

    Raises:
        ValueError: naming the shard, when it is not there, cannot be read or is no tar.
    """
    storage = Storage(config.data.cache, config.data.network)
    slowest = 0.0
    for source in config.data.train:
        name = f"data.train ({redact(source.shards)})"
        url = expand(source.shards, name)[0]
        begun = time.perf_counter()
        try:
            tarfile.TarInfo.frombuf(storage.head(url)[:512], "utf-8", "replace")
        except tarfile.TarError as error:
            raise ValueError(f"{name}: {redact(url)} is no tar: {error}") from error
        except OSError as error:
            raise ValueError(f"{name}: {redact(url)} cannot be opened: {error}") from error
        slowest = max(slowest, time.perf_counter() - begun)
    storage.check([source.shards for source in config.data.train])
    return slowest


class WriteTest:
    """A folder in the output folder that rank 0 makes, all ranks write into, and rank 0 removes.

    Args:
        config: Of the run: the folder is made in its run folder where there is one, else in
            ``output_dir``.
        hosts: Name of every rank's host.
        rank: Of this process.
    """

    def __init__(self, config: Config, hosts: Sequence[str], rank: int) -> None:
        self._run_dir, self._output_dir = config.run_dir, Path(config.output_dir)
        self._hosts, self._rank = hosts, rank
        self._made: list[Path] = []

    def make(self) -> Path:
        """On rank 0: the folder, with what is missing above it."""
        above = self._run_dir if self._run_dir.is_dir() else self._output_dir
        folder = above / f".preflight-{uuid.uuid4().hex}"
        missing = [each for each in (above, *above.parents) if not each.exists()]
        self._made = [folder, *missing]
        folder.mkdir(parents=True)
        return folder

    def write(self, folder: Path) -> float:
        """This rank's file; seconds until it is on the disk.

        Raises:
            ValueError: naming the folder.
        """
        path, content = self._file(folder, self._rank), self._content(self._rank)
        try:
            # The folder is not made here: who sees another storage would make one of its own.
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                begun = time.perf_counter()
                os.fsync(file.fileno())
        except FileNotFoundError as error:
            raise ValueError(f"{folder}, which {self._hosts[0]} has made, is not there") from error
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
        return time.perf_counter() - begun

    def see(self, folder: Path, written: Sequence[int]) -> float:
        """Look for all files, and read one of the next host; seconds until they are there.

        Args:
            folder: That of rank 0.
            written: Ranks that have written.

        Raises:
            ValueError: naming the hosts whose files are not seen, or differ.
        """
        begun = time.perf_counter()
        while True:
            names = {path.name for path in folder.iterdir()}
            unseen = [rank for rank in written if self._file(folder, rank).name not in names]
            seconds = time.perf_counter() - begun
            if not unseen:
                break
            if seconds > _VISIBLE_WITHIN:
                hosts = ", ".join(dict.fromkeys(self._hosts[rank] for rank in unseen))
                raise ValueError(
                    f"{folder}: files of {hosts} not seen after {_VISIBLE_WITHIN:.0f} s"
                )
            time.sleep(0.1)
        others = [rank for rank in written if self._hosts[rank] != self._hosts[self._rank]]
        other = min((rank for rank in others if rank > self._rank), default=(others or [0])[0])
        if others and self._file(folder, other).read_bytes() != self._content(other):
            raise ValueError(f"{folder}: reads otherwise than {self._hosts[other]} has written")
        return seconds

    def remove(self) -> None:
        """On rank 0: all of it, and folders above that were made and are still empty."""
        for folder in self._made[:1]:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._made[1:]:
            with suppress(OSError):
                folder.rmdir()

    def _file(self, folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}"

    def _content(self, rank: int) -> bytes:
        line = f"rank {rank} of {self._hosts[rank]}\n".encode()
        return line * (_WRITTEN // len(line))

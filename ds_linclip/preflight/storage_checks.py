"""Checks of what the nodes share: the output folder, the training data, the held-out data."""

import shutil
import tarfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ds_linclip.config import Config, Source
from ds_linclip.data import Storage, find_shards
from ds_linclip.data.causes import explain, format_cause
from ds_linclip.data.remote import redact
from ds_linclip.data.shard_index import expand
from ds_linclip.preflight.rendezvous import Rendezvous
from ds_linclip.preflight.shared_folder import read_probes, write_probe
from ds_linclip.preflight.table import CheckResult, problems_if
from ds_linclip.preflight.verdicts import format_range, plural, seconds_of

__all__ = ["check_held_out_data", "check_output_folder", "check_training_data"]

#: Seconds for an fsync of one MiB from which on to warn.
_SLOW_SYNC = 1.0


def check_output_folder(rendezvous: Rendezvous, config: Config) -> CheckResult:
    """Check that all ranks write into and see one folder.

    Rank 0 creates it in the run folder where there is one, else in ``output_dir``, and removes it.
    """
    above = config.run_dir if config.run_dir.is_dir() else Path(config.output_dir)
    created: list[Path] = []  # on rank 0

    def create() -> str:
        folder = above / f".preflight-{uuid.uuid4().hex}"
        created.extend([folder, *(each for each in (above, *above.parents) if not each.exists())])
        folder.mkdir(parents=True)
        return str(folder)

    rule = f"output_dir ({config.output_dir}) must be writable"
    remedy = "give this user the permission to write there, or choose another output_dir"
    found, seconds = config.output_dir, dict[str, float]()
    try:
        results = rendezvous.gather("create a folder", create, [0])
        problems = problems_if(results.failures(), rule, remedy)
        if not problems:
            folder, hosts, rank = Path(results.values[0]), rendezvous.hosts, rendezvous.rank
            rule = f"output_dir ({config.output_dir}) must be one folder, which all hosts see"
            remedy = "put it on storage that all hosts mount at the same place"
            written = rendezvous.gather("write", partial(write_probe, folder, hosts, rank))
            seconds, writers = written.by_host(max), list(written.values)
            read = rendezvous.gather(
                "read", partial(read_probes, folder, hosts, rank, writers), writers
            )
            problems = problems_if(written.failures() + read.failures(), rule, remedy)
    finally:
        for path in created[:1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in created[1:]:
            with suppress(OSError):  # not empty any more
                path.rmdir()
    if not problems:
        found += f": written and seen by all; 1 MiB synced in {format_range(seconds, 1e3)} ms"
    problems += problems_if(
        [
            (host, f"{each:.1f} s to sync 1 MiB")
            for host, each in seconds.items()
            if each > _SLOW_SYNC
        ],
        f"at most {_SLOW_SYNC:g} s: a checkpoint is synced before it counts",
        "check that storage's load, or choose another output_dir",
        is_warning=True,
    )
    figures = {"fsync_seconds": seconds}
    return CheckResult(check="output folder", found=found, problems=problems, figures=figures)


def check_training_data(rendezvous: Rendezvous, config: Config) -> CheckResult:
    """Find all shards on rank 0, as training does; open the first of each source on every host."""
    shards = rendezvous.gather("all shards", partial(_count_shards, config), [0])
    open_first = partial(_open_first_shards, config)
    opened = rendezvous.gather("first shards", open_first, rendezvous.leaders)
    problems = problems_if(
        shards.failures() + opened.failures(),
        "all shards must be there, and the first of every source readable on every host",
        "fix data.train, or mount it, or give the host its credentials and network",
    )
    found = ""
    if not problems:
        num_samples, num_shards, num_sources = shards.values[0]
        found = (
            f"{plural(num_samples, 'sample')} in {plural(num_shards, 'shard')} of "
            f"{plural(num_sources, 'source')}; first shards opened in "
            f"{format_range(opened.by_host(max), 1e3)} ms"
        )
    return CheckResult(check="training data", found=found, problems=problems)


def _count_shards(config: Config) -> tuple[int, int, int]:
    """Return the numbers of samples, shards and sources; raise ValueError for a missing shard."""
    storage = Storage(config.data.cache, config.data.network)
    groups = find_shards(config.data.train, storage)
    shards = [shard for group in groups for shard in group.shards]
    return sum(shard.num_samples for shard in shards), len(shards), len(config.data.train)


def _open_first_shards(config: Config) -> float:
    """Read the head of the first shard of every source; return the seconds of the slowest.

    Raises:
        ValueError: naming the shard, when it is not there, cannot be read or is no tar file.
    """
    storage = Storage(config.data.cache, config.data.network)

    def open_first(source: Source) -> None:
        name = f"data.train ({redact(source.shards)})"
        url = expand(source.shards, name)[0]
        try:
            head = storage.head(url)
        except OSError as error:
            raise ValueError(f"{name}: {redact(url)} cannot be opened: {error}") from error
        try:
            tarfile.TarInfo.frombuf(head, "utf-8", "replace")
        except tarfile.TarError as error:
            cause = format_cause(head)
            reason = explain(cause) if cause else error
            raise ValueError(f"{name}: {redact(url)} is no tar file: {reason}") from error

    slowest = max(seconds_of(partial(open_first, source)) for source in config.data.train)
    storage.check([source.shards for source in config.data.train])
    return slowest


def check_held_out_data(
    rendezvous: Rendezvous, folder: str, open_evaluation: Callable[[], object]
) -> CheckResult:
    """Open the held-out data, which is in ``folder``, on one rank of every host.

    ``open_evaluation`` raises ValueError when it cannot be scored.
    """
    opened = partial(seconds_of, open_evaluation)
    results = rendezvous.gather("held-out data", opened, rendezvous.leaders)
    problems = problems_if(
        results.failures(),
        f"eval.data ({folder}) must be readable on every host",
        "fix eval.data, or mount it there",
    )
    found = folder
    if results.values:
        found += f" opened in {format_range(results.by_host(max))} s"
    return CheckResult(check="held-out data", found=found, problems=problems)

"""Ends a run that hangs, after writing the stacks of all ranks and naming the one that is behind.

Every rank has a thread that watches the phase of its training loop. It runs while the loop waits in
a collective, in a file system or for a data worker. Ranks communicate through files in the run
folder, which all of them see: torch's store is part of rank 0 and would hang with it.
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from ds_linclip.config import Config, WatchdogConfig
from ds_linclip.parallel.mesh import DEFAULT_TIMEOUT, Mesh
from ds_linclip.process.atomic import write_atomically
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.process.phase import PhaseTracker

__all__ = ["collective_timeout", "summarize", "watched"]

logger = logging.getLogger(__name__)

#: What is known of a rank: run, rank, host, pid, the fields of its Phase, seconds in that, state.
_Facts = dict[str, Any]


def collective_timeout(config: WatchdogConfig) -> timedelta:
    """Return the time-out to give to process groups: at least 30 minutes.

    It exceeds the watchdog's by ten minutes, in which all ranks have written their stacks and left:
    a collective that times out first ends the process without naming the rank at fault.
    """
    return max(DEFAULT_TIMEOUT, timedelta(seconds=config.timeout_seconds, minutes=10))


@contextmanager
def watched(config: Config, mesh: Mesh) -> Iterator[PhaseTracker]:
    """Yield the :class:`PhaseTracker` of the training loop, and end all ranks if one stays in a
    phase.

    Before the loop enters its first phase nothing is watched, as the run folder may still belong to
    another run.

    Once a phase has lasted ``watchdog.timeout_seconds`` on any rank, every rank writes the stacks
    of its threads into ``<run folder>/hang/<start of the run>/rank-N.txt``. For a rank that cannot,
    another rank of its host writes what ``/proc`` shows, and wakes it if it was stopped. One rank
    says on stderr and in ``summary.txt`` which rank is behind. Then all end with
    ``ExitCode.HUNG``.

    The time-out must exceed the longest phase of a healthy run: building the model, loading a
    checkpoint, the first step with its compilation, a save, an evaluation, a wait for data with all
    its retries. Process groups must have the longer time-out of :func:`collective_timeout`. Time in
    which the whole process was stopped (Slurm suspends jobs so) does not count. If the run folder's
    file system hangs, so does the watchdog, and only process groups end the run.

    All ranks call this together; with ``watchdog.timeout_seconds`` 0 nothing is watched.
    """
    progress = PhaseTracker()
    if config.watchdog.timeout_seconds == 0:
        yield progress
        return
    started = mesh.from_rank_zero(lambda: datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f"))
    watchdog = _Watchdog(progress, config, mesh, f"started-{started}")
    watchdog.start()
    try:
        yield progress
    finally:
        watchdog.close()


class _Watchdog(threading.Thread):
    """Watches this rank's progress, and the other ranks' files; ``run`` is the name of this start
    of the run, the same on all ranks."""

    def __init__(self, progress: PhaseTracker, config: Config, mesh: Mesh, run: str) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._progress = progress
        self._run = run
        self._heartbeats = config.run_dir / "watchdog"
        self._reports = config.run_dir / "hang" / run
        self._rank, self._world_size = mesh.rank, mesh.world_size
        self._timeout = timeout = config.watchdog.timeout_seconds
        self._poll = min(10.0, timeout / 20)
        self._grace = max(1.0, min(60.0, timeout / 5))
        self._host = socket.gethostname()
        self._closing = threading.Event()
        self._stacks: TextIO | None = None

    def run(self) -> None:
        in_phase, entered, polled = 0.0, 0, time.monotonic()
        while not self._closing.wait(self._poll):
            now = time.monotonic()
            # A longer gap is time in which this process was stopped.
            in_phase += min(now - polled, 2 * self._poll)
            polled = now
            place = self._progress.current
            if place.entered == 0:
                continue
            if place.entered > entered:
                in_phase, entered = 0.0, place.entered
            try:
                self._arm_timer()
                write_atomically(self._heartbeat_of(self._rank), json.dumps(self._facts()))
            except OSError as error:  # for example a full disk, which ends the run at its next save
                logger.warning("no sign of life written: %s", error)
            if self._reports.exists():
                self._follow()
            elif in_phase > self._timeout:
                self._declare()

    def close(self) -> None:
        """Stop watching; a report that was started is finished first."""
        self._closing.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            for path in (self._heartbeat_of(self._rank), self._stacks_of(self._rank)):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # other ranks still use it
                self._heartbeats.rmdir()

    def _heartbeat_of(self, rank: int) -> Path:
        return self._heartbeats / f"rank-{rank:05d}.json"

    def _stacks_of(self, rank: int) -> Path:
        return self._heartbeats / f"rank-{rank:05d}.stacks"

    def _report_of(self, rank: int) -> Path:
        return self._reports / f"rank-{rank:05d}.txt"

    def _arm_timer(self) -> None:
        """Restart a timer in C that writes the stacks if C code in the training loop keeps Python
        from running this thread."""
        if self._stacks is None:
            self._heartbeats.mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_of(self._rank).open("w")
        faulthandler.dump_traceback_later(self._timeout, file=self._stacks)

    def _facts(self) -> _Facts:
        place = self._progress.current._asdict()
        me = {"run": self._run, "rank": self._rank, "host": self._host, "pid": os.getpid()}
        return {**me, **place, "seconds": time.time() - place["since"], "state": "running"}

    def _declare(self) -> None:
        """Be the first to declare a hang: collect all reports and name the rank that is behind."""
        try:
            self._reports.parent.mkdir(exist_ok=True)
            self._reports.mkdir()
        except FileExistsError:
            self._follow()
        except OSError:
            pass  # reported below, when writing the report fails too
        with self._ending():
            self._write_reports()
            self._wait(self._all_reported, self._grace)
            summary = summarize([self._found(rank) for rank in range(self._world_size)])
            line = f"{summary}; stacks: {self._reports}\n"
            # A single write, as those of several ranks would mix; not through the logger, whose
            # lock another thread may hold. It starts a new line, after a progress bar.
            sys.stderr.write(f"\nerror: {line}")
            sys.stderr.flush()
            write_atomically(self._reports / "summary.txt", line)
            time.sleep(2 * self._poll)  # for ranks that were woken to write their stacks

    def _follow(self) -> None:
        """Write this rank's stacks, and end after the rank that declared the hang."""
        with self._ending():
            self._write_reports()
            self._wait((self._reports / "summary.txt").exists, 2 * self._grace)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End the process after this context, whatever happens in it."""
        try:
            yield
        except OSError as error:
            sys.stderr.write(f"error: rank {self._rank} hangs and cannot report it: {error}\n")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        finally:
            sys.stderr.flush()
            os._exit(ExitCode.HUNG)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            time.sleep(self._poll / 4)

    def _all_reported(self) -> bool:
        return all(_is_written(self._report_of(rank)) for rank in range(self._world_size))

    def _write_reports(self) -> None:
        """Write this rank's report and, after a while, those of ranks of this host that cannot."""
        path = self._report_of(self._rank)
        _write_first(path, json.dumps(self._facts()) + "\n")
        with path.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._wait(self._all_reported, self._grace)
        for rank in range(self._world_size):
            facts = self._read(self._heartbeat_of(rank))
            path = self._report_of(rank)
            if path.exists() or facts.get("host") != self._host:
                continue
            state, seconds = _process_state(facts["pid"]), time.time() - facts["since"]
            facts |= {"state": state, "seconds": seconds}
            stacks = self._stacks_of(rank)
            written = stacks.read_text() if stacks.exists() else ""
            is_first = _write_first(path, json.dumps(facts) + "\n" + written)
            if is_first and state == "stopped":
                os.kill(facts["pid"], signal.SIGCONT)

    def _found(self, rank: int) -> _Facts:
        """Return what is known of a rank, from its report or else from its last heartbeat."""
        path = self._report_of(rank)
        if _is_written(path):
            return json.loads(path.read_text().splitlines()[0])
        facts = self._read(self._heartbeat_of(rank))
        seconds = time.time() - facts.get("since", time.time())
        return {"rank": rank, **facts, "seconds": seconds, "state": "silent"}

    def _read(self, heartbeat: Path) -> _Facts:
        """Return a rank's last heartbeat in this start of the run, or nothing."""
        try:
            facts = json.loads(heartbeat.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return facts if facts["run"] == self._run else {}


def summarize(found: Sequence[_Facts]) -> str:
    """Return one line that names the ranks that are behind.

    These are the ranks that do not run or, if all run, those that have entered the fewest phases.
    ``found`` has the known facts of every rank, in rank order.
    """
    culprits = [facts for facts in found if facts["state"] != "running"]
    if not culprits:
        fewest = min(facts["entered"] for facts in found)
        culprits = [facts for facts in found if facts["entered"] == fewest]
    others = [facts for facts in found if facts not in culprits]
    if not others:
        return f"hang: no rank is behind, all {len(found)} are at {_where(found[0])}"
    named = ", ".join(
        f"rank {facts['rank']} (host {facts.get('host', 'unknown')}, pid "
        f"{facts.get('pid', 'unknown')}) is behind: {facts['state']}, {_where(facts)}"
        for facts in culprits[:8]
    )
    more = f" and {len(culprits) - 8} more" if len(culprits) > 8 else ""
    furthest = max(others, key=lambda facts: facts["entered"])
    return f"hang: {named}{more}; {len(others)} of {len(found)} ranks wait at {_where(furthest)}"


def _where(facts: Mapping[str, Any]) -> str:
    if "phase" not in facts:
        return "no sign of life since the start"
    return f"step {facts['step']}, {facts['phase']} for {facts['seconds']:.0f} s"


def _process_state(pid: int) -> str:
    """Return the state of a process of this host, as the kernel sees it."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    names = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead", "D": "waiting for a device"}
    return names.get(letter, "running without its watchdog")


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _write_first(path: Path, text: str) -> bool:
    """Write a file unless another rank has created it; return whether this rank did."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True

"""Ends a run that hangs, with the stacks of all ranks and the name of the one that is behind.

Every rank has a thread that looks at the phase its training loop is in. It runs while the loop
waits in a collective, in a file system or in a data worker. Ranks tell each other through files in
the run folder, which all of them see: torch's store lives in rank 0, and would hang with it.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.process.phase import Progress

__all__ = ["summarize", "watched"]

logger = logging.getLogger(__name__)

#: Facts about a rank: run, rank, host, pid, those of its Place, seconds in that, state.
_Facts = dict[str, Any]


@contextmanager
def watched(config: Config, mesh: Mesh) -> Iterator[Progress]:
    """While in this context, a rank that stays in one phase for too long ends all ranks.

    The phase is that of the :class:`Progress` that is handed out; before the training loop enters
    the first one, when the run folder is not yet known to be this run's, nothing is watched.

    Once a phase has lasted ``watchdog.timeout_seconds`` on any rank, every rank writes the stacks
    of its threads into ``<run folder>/hang/<start of the run>/rank-N.txt``; a rank that cannot is
    looked up in ``/proc`` by another one of its host, and woken if it was stopped. One rank says
    on stderr, and in ``summary.txt``, which rank is behind. Then all leave with ``ExitCode.HUNG``.

    The time must exceed the longest phase of a healthy run: building the model, loading a
    checkpoint, the first step with its compilation, a save, an evaluation, a wait for data with all
    its retries. It should be below the 30 minutes after which process
    groups give up on a collective with less to say. Time in which the whole process was stopped
    (Slurm suspends jobs so) does not count. A run folder that does not answer hangs the watchdog
    too.

    Args:
        config: Its ``watchdog.timeout_seconds``; 0 watches nothing.
        mesh: Called by all of its ranks together.
    """
    progress = Progress()
    if config.watchdog.timeout_seconds == 0:
        yield progress
        return
    started = mesh.from_rank_zero(lambda: datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f"))
    watchdog = _Watchdog(
        progress,
        config.run_dir,
        f"started-{started}",
        (mesh.rank, mesh.world_size),
        config.watchdog.timeout_seconds,
    )
    watchdog.start()
    try:
        yield progress
    finally:
        watchdog.close()


class _Watchdog(threading.Thread):
    """Looks at one rank's progress and at the other ranks' files.

    Args:
        progress: Of this rank.
        run_dir: Where ``watchdog/`` (signs of life) and ``hang/`` (what was found) are.
        run: Name of this start of the run, the same on all ranks.
        place: Rank and world size.
        timeout: Seconds.
    """

    def __init__(
        self, progress: Progress, run_dir: Path, run: str, place: tuple[int, int], timeout: float
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._progress = progress
        self._run = run
        self._signs = run_dir / "watchdog"
        self._reports = run_dir / "hang" / run
        self._rank, self._world_size = place
        self._timeout = timeout
        self._poll = min(10.0, timeout / 20)
        self._grace = max(1.0, min(60.0, timeout / 5))
        self._host = socket.gethostname()
        self._closing = threading.Event()
        self._stacks: TextIO | None = None

    def run(self) -> None:
        stuck, entered, looked = 0.0, 0, time.monotonic()
        while not self._closing.wait(self._poll):
            now = time.monotonic()
            # A longer gap is time in which this process did not run.
            stuck += min(now - looked, 2 * self._poll)
            looked = now
            place = self._progress.place
            if place.entered == 0:
                continue
            if place.entered > entered:
                stuck, entered = 0.0, place.entered
            try:
                self._arm_timer()
                self._give_sign()
            except OSError as error:  # a full disk, say, is for saving to complain about
                logger.warning("no sign of life written: %s", error)
            if stuck > self._timeout and not self._reports.exists():
                self._declare()
            elif self._reports.exists():
                self._follow()

    def close(self) -> None:
        """Stop watching; a report that has begun is brought to its end."""
        self._closing.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            for path in (self._sign_of(self._rank), self._stacks_of(self._rank)):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # other ranks are still in it
                self._signs.rmdir()

    def _sign_of(self, rank: int) -> Path:
        return self._signs / f"rank-{rank:05d}.json"

    def _stacks_of(self, rank: int) -> Path:
        return self._signs / f"rank-{rank:05d}.stacks"

    def _report_of(self, rank: int) -> Path:
        return self._reports / f"rank-{rank:05d}.txt"

    def _arm_timer(self) -> None:
        """Have C code write the stacks should the loop keep Python from running this thread."""
        if self._stacks is None:
            self._signs.mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_of(self._rank).open("w")
        faulthandler.dump_traceback_later(self._timeout, file=self._stacks)

    def _give_sign(self) -> None:
        _replace(self._sign_of(self._rank), json.dumps(self._facts()))

    def _facts(self) -> _Facts:
        place = self._progress.place._asdict()
        me = {"run": self._run, "rank": self._rank, "host": self._host, "pid": os.getpid()}
        return {**me, **place, "seconds": time.time() - place["since"], "state": "running"}

    def _declare(self) -> None:
        """Be the first to say that the run hangs, collect all reports, name the culprit."""
        try:
            self._reports.parent.mkdir(exist_ok=True)
            self._reports.mkdir()
        except FileExistsError:
            self._follow()
        except OSError:
            pass  # told below, when the report cannot be written either
        with self._leaving():
            self._report_own()
            self._wait(self._all_reported, self._grace)
            self._report_neighbours()
            self._wait(self._all_reported, self._grace)
            summary = summarize([self._found(rank) for rank in range(self._world_size)])
            line = f"{summary}; stacks: {self._reports}\n"
            # One write, or those of several ranks mix. The run's logger may wait for a lock.
            sys.stderr.write(f"\nerror: {line}")  # not behind a progress bar
            sys.stderr.flush()
            _replace(self._reports / "summary.txt", line)
            time.sleep(2 * self._poll)  # for those that were woken to write their stacks

    def _follow(self) -> None:
        """Write this rank's stacks and leave after the rank that says what was found."""
        with self._leaving():
            self._report_own()
            self._wait(self._all_reported, self._grace)
            self._report_neighbours()
            self._wait((self._reports / "summary.txt").exists, 2 * self._grace)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
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

    def _report_own(self) -> None:
        path = self._report_of(self._rank)
        _write_first(path, json.dumps(self._facts()) + "\n")
        with path.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _report_neighbours(self) -> None:
        """For ranks of this host that cannot write: what the kernel knows; wake stopped ones."""
        for rank in range(self._world_size):
            facts = self._read(self._sign_of(rank))
            path = self._report_of(rank)
            if path.exists() or facts.get("host") != self._host:
                continue
            facts |= {
                "state": _process_state(facts["pid"]),
                "seconds": time.time() - facts["since"],
            }
            stacks = self._stacks_of(rank)
            written = stacks.read_text() if stacks.exists() else ""
            is_first = _write_first(path, json.dumps(facts) + "\n" + written)
            if is_first and facts["state"] == "stopped":
                os.kill(facts["pid"], signal.SIGCONT)

    def _found(self, rank: int) -> _Facts:
        """What is known of a rank: from its report, else from its last sign of life."""
        path = self._report_of(rank)
        if _is_written(path):
            return json.loads(path.read_text().splitlines()[0])
        facts = self._read(self._sign_of(rank))
        seconds = time.time() - facts.get("since", time.time())
        return {"rank": rank, **facts, "seconds": seconds, "state": "silent"}

    def _read(self, sign: Path) -> _Facts:
        """A rank's last sign of life in this start of the run; empty without one."""
        try:
            facts = json.loads(sign.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return facts if facts["run"] == self._run else {}


def summarize(found: Sequence[_Facts]) -> str:
    """Which ranks are behind, in one line.

    Those that do not run are; else those that have entered fewest phases.

    Args:
        found: Facts of every rank, in rank order.
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
    """What the kernel says of a process of this host."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    names = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead", "D": "waiting for a device"}
    return names.get(letter, "running without its watchdog")


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _write_first(path: Path, text: str) -> bool:
    """Write a file unless another rank has begun to; whether it was this one."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole whenever somebody reads it."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text)
    staging.replace(path)

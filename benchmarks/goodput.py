"""The cost of failures: ``python -m benchmarks.goodput [--minutes 30] [key=value ...]``.

Trains the embedded model on two gloo ranks under ``linclip_launch.supervise``, and kills a rank,
now and then the launcher, at random times. Reports the seconds from every kill to the next step and
the steps that were repeated; the goodput of the run, which is the share of its time that went into
steps that counted; and whether every step and every sample was counted once. Exit code 1 when one
was not.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure

from benchmarks import REPOSITORY, benchmark_facts, results_folder
from ds_linclip.config import Config, load_config
from ds_linclip.data import Storage, TrainData, find_shards
from ds_linclip.data.tar_index import OpenShard
from linclip_eval.plotting import COLOURS, LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report
from linclip_launch.supervise import is_running, launcher_and_ranks

EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"
RANKS = 2
LAUNCHER_SHARE = 0.2  # of the kills
MEASURED = ["ds_linclip", "launch", "kernels/linclip_kernels"]


@dataclass
class Kill:
    """A line of ``kills.csv``; times in seconds since the start of the run.

    Attributes:
        at: Time of the kill.
        victim: "rank N" or "launcher".
        step: Last step that was finished before.
        resumed_from: Step of the checkpoint the run resumed from.
        steps_repeated: Number of steps that were finished before and had to be repeated.
        seconds_to_step: Time to the next finished step; None when the run was killed again before.
    """

    at: float
    victim: str
    step: int
    resumed_from: int | None = None
    steps_repeated: int | None = None
    seconds_to_step: float | None = None


@dataclass(frozen=True)
class Step:
    """A step in the log; ``at`` is in seconds since the start of the run."""

    at: float
    step: int
    loss: float


@dataclass(frozen=True)
class Totals:
    """Times in seconds, and counts of steps, of the whole run."""

    wall: float
    counted: float
    repeated: float
    steps: int
    steps_repeated: int

    @property
    def goodput(self) -> float:
        return self.counted / self.wall


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="goodput-") as output:
        common = [*arguments.overrides, "eval.data=null", f"output_dir={output}"]
        common += ["log.every_steps=1", "log.tensorboard=false", "log.sample_keys=true"]
        common += ["optim.warmup_steps=10"]
        speed = _reference(common)
        num_steps = max(20, round(60 * arguments.minutes / speed))
        every = max(1, round(arguments.seconds_between_saves / speed))
        print(
            f"{speed:.3f} s per step without kills: {num_steps} steps, saved every {every}",
            flush=True,
        )
        overrides = [*common, "name=killed", f"train.steps={num_steps}"]
        overrides += [f"checkpoint.every_steps={every}"]
        config = load_config(EMBEDDED, overrides)
        kills, steps, wall = _killed_run(config, overrides, arguments)
        attempts = _attempts(config, kills, steps)
        totals = _totals(attempts, wall)
        problems = _problems(config, attempts)
    folder = arguments.out or results_folder("goodput", "cpu")
    print(write(folder, kills, attempts, totals, problems, every))
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for the embedded config, such as data.train")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, without failures")
    parser.add_argument("--mean-minutes-between-kills", type=float, default=2.0)
    parser.add_argument("--seconds-between-saves", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="for times and victims")
    parser.add_argument("--out", type=Path, help="default: docs/results/goodput/<device>")
    return parser


def _supervise(overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "linclip_launch.supervise", "--ranks", str(RANKS)]
    command += ["--max-restarts", "20", "--backoff-seconds", "1", str(EMBEDDED), *overrides]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


def _reference(common: Sequence[str]) -> float:
    """Return the seconds per step of a short run without kills."""
    overrides = [*common, "name=reference", "train.steps=60"]
    if _supervise(overrides).wait() != 0:
        raise RuntimeError("the run without kills failed")
    records = _Log(load_config(EMBEDDED, overrides).run_dir / "metrics.jsonl").read()
    return statistics.median(record["perf/seconds_per_step"] for record in records[10:])


class _Log:
    """Reader of a growing file of JSON lines, which a restart of the run may truncate."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._kept: list[bytes] = []

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that were added since the last call."""
        seen = self._whole_lines()
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._file.close()  # truncated: another file is in its place
            self._file = None
        if self._file is None and self._path.exists():
            self._file = self._path.open("rb")
            before, self._kept = self._kept, []
            now = self._whole_lines()
            pairs = zip(before, now, strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            seen += now[shared:]
        return [json.loads(line) for line in seen]

    def _whole_lines(self) -> list[bytes]:
        """Return the rest of the open file, up to the last end of a line."""
        lines: list[bytes] = []
        while self._file is not None and (line := self._file.readline()).endswith(b"\n"):
            lines.append(line)
        if self._file is not None and line:
            self._file.seek(-len(line), os.SEEK_CUR)
        self._kept += lines
        return lines


def _killed_run(
    config: Config, overrides: Sequence[str], arguments: argparse.Namespace
) -> tuple[list[Kill], list[Step], float]:
    """Run to the end with kills; return kills, steps in the order of the log, and seconds."""
    chance = random.Random(arguments.seed)
    mean = 60 * arguments.mean_minutes_between_kills
    log = _Log(config.run_dir / "metrics.jsonl")
    kills: list[Kill] = []
    steps: list[Step] = []
    start = time.time()
    next_kill = chance.expovariate(1 / mean)
    supervisor = _supervise(overrides)
    try:
        while supervisor.poll() is None:
            now = time.time() - start
            steps += _steps(log, now)
            if now >= next_kill:
                kill = _kill(supervisor.pid, chance, start)
                if kill:
                    time.sleep(0.3)  # for a step that the others were about to log
                    steps += _steps(log, kill.at)
                    kill.step = steps[-1].step if steps else 0
                    kills.append(kill)
                next_kill = now + (chance.expovariate(1 / mean) if kill else 0.5)
            time.sleep(0.02)
    finally:
        supervisor.terminate()
    if supervisor.returncode != 0:
        raise RuntimeError(f"the run ended with exit code {supervisor.returncode}")
    wall = time.time() - start
    steps += _steps(log, wall)
    restarts = _Log(config.run_dir / "restarts.jsonl").read()
    for kill in kills:
        again = next((r for r in restarts if r["time"] - start > kill.at), None)
        if again is None:  # just as the run ended
            continue
        following = [r["time"] - start for r in restarts if r["time"] > again["time"]]
        until = min(following, default=wall)
        done = [s.at for s in steps if again["time"] - start < s.at < until]
        kill.resumed_from = again["step"]
        kill.seconds_to_step = done[0] - kill.at if done else None
    return kills, steps, wall


def _steps(log: _Log, at: float) -> list[Step]:
    return [Step(at, record["step"], record["train/loss"]) for record in log.read()]


def _kill(supervisor: int, chance: random.Random, start: float) -> Kill | None:
    """Kill a rank or the launcher; return None when there is none, between two starts."""
    launcher, ranks = launcher_and_ranks(supervisor)
    takes_launcher, rank = chance.random() < LAUNCHER_SHARE, chance.randrange(RANKS)
    if launcher is None or (not takes_launcher and len(ranks) < RANKS):
        return None
    victim = launcher if takes_launcher else ranks[rank]
    os.kill(victim, signal.SIGKILL)
    while is_running(victim):
        time.sleep(0.01)
    return Kill(time.time() - start, "launcher" if takes_launcher else f"rank {rank}", step=0)


@dataclass(frozen=True)
class Attempt:
    """The steps between two starts of the run; those up to ``last`` counted."""

    steps: list[Step]
    last: int


def _attempts(config: Config, kills: Sequence[Kill], steps: Sequence[Step]) -> list[Attempt]:
    """Split the log at the starts of the run; count repeated steps in ``kills``."""
    starts = sorted({kill.at for kill in kills if kill.resumed_from is not None})
    pieces: list[list[Step]] = [
        [step for step in steps if begin < step.at <= end]
        for begin, end in itertools.pairwise([0.0, *starts, float("inf")])
    ]
    resumed = [kill.resumed_from for kill in kills if kill.resumed_from is not None]
    attempts = [
        Attempt(piece, last)
        for piece, last in zip(pieces, [*resumed, config.train.steps], strict=True)
    ]
    counted_kills = [kill for kill in kills if kill.resumed_from is not None]
    for kill, attempt in zip(counted_kills, attempts, strict=False):
        kill.steps_repeated = sum(step.step > attempt.last for step in attempt.steps)
    return attempts


def _totals(attempts: Sequence[Attempt], wall: float) -> Totals:
    """Sum up the time of steps, from the end of one to the end of the next, saves included.

    The first step after a start, whose beginning is not in the log, counts as a median step.
    """
    gaps = [
        (attempt, after.step, after.at - before.at)
        for attempt in attempts
        for before, after in itertools.pairwise(attempt.steps)
    ]
    median = statistics.median(seconds for *_, seconds in gaps)
    gaps += [(each, each.steps[0].step, median) for each in attempts if each.steps]
    counted = [seconds for attempt, step, seconds in gaps if step <= attempt.last]
    repeated = [seconds for attempt, step, seconds in gaps if step > attempt.last]
    return Totals(wall, sum(counted), sum(repeated), len(counted), len(repeated))


def _problems(config: Config, attempts: Sequence[Attempt]) -> list[str]:
    """Describe what was lost, counted twice, or different when repeated."""
    wanted = list(range(1, config.train.steps + 1))
    counted = [s.step for attempt in attempts for s in attempt.steps if s.step <= attempt.last]
    problems = [] if counted == wanted else ["steps that counted are not 1, 2, 3, ..."]
    losses = defaultdict(set)
    for step in (step for attempt in attempts for step in attempt.steps):
        losses[step.step].add(step.loss)
    differing = [step for step, values in losses.items() if len(values) > 1]
    if differing:
        problems.append(f"loss of steps {differing[:5]} was not the same when repeated")
    expected = _expected_keys(config)
    seen = set()
    for rank in range(RANKS):
        path = config.run_dir / "samples" / f"rank-{rank:05d}.jsonl"
        for line in map(json.loads, path.read_text().splitlines()):
            seen.add((rank, line["step"]))
            if line["keys"] != expected(line["step"], rank):
                problems.append(f"samples of step {line['step']}, rank {rank} are out of order")
    if seen != {(rank, step) for rank in range(RANKS) for step in wanted}:
        problems.append("the log of samples does not hold every step of every rank")
    return problems


def _expected_keys(config: Config) -> Callable[[int, int], list[str]]:
    """Return a function of step and rank: sample keys, from the sample order and the tars."""
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    order = TrainData(config, groups, dp_rank=0, dp_size=1).order
    keys = []
    for shard in (shard for group in groups for shard in group.shards):
        with Path(shard.url).open("rb") as file:
            keys.append(list(OpenShard(file, shard.url).keys))

    def expected(step: int, rank: int) -> list[str]:
        positions = order.step_positions(
            step - 1,
            global_batch_size=config.train.global_batch_size,
            dp_rank=rank,
            dp_size=RANKS,
        )
        return [keys[shard][index] for shard, index in zip(*order.locate(positions), strict=True)]

    return expected


def write(
    folder: Path,
    kills: Sequence[Kill],
    attempts: Sequence[Attempt],
    totals: Totals,
    problems: Sequence[str],
    every: int,
) -> str:
    """Write kills.csv, goodput.png and summary.md, whose text is returned."""
    times = [kill.seconds_to_step for kill in kills if kill.seconds_to_step is not None]
    repeated = [kill.steps_repeated for kill in kills if kill.steps_repeated is not None]
    down = totals.wall - totals.counted - totals.repeated
    launchers = sum(kill.victim == "launcher" for kill in kills)
    figures = {
        "wall time, s": f"{totals.wall:.0f}",
        "kills of a rank, of the launcher": f"{len(kills) - launchers}, {launchers}",
        "goodput: time in steps that counted, saves included": f"{totals.goodput:.1%}",
        "time in steps that were repeated": f"{totals.repeated / totals.wall:.1%}",
        "time down: noticing, starting, loading": f"{down / totals.wall:.1%}",
        "steps that counted, repeated": f"{totals.steps}, {totals.steps_repeated}",
        "from a kill to the next step, median and most, s": _middle_and_most(times),
        "steps repeated per kill, median and most": _middle_and_most(repeated),
        "steps or samples lost, doubled or changed": "; ".join(problems) or "none",
    }
    return write_report(
        folder,
        title="Goodput under random kills",
        sections=[
            f"{RANKS} gloo ranks, saved every {every} steps.",
            markdown_table(["", ""], list(figures.items())),
            "Every line of the sample log is compared with the order computed from seed and "
            "shards; losses of steps that were repeated must be bitwise what they were.",
            "![Steps over wall time](goodput.png)",
        ],
        facts=benchmark_facts("cpu", MEASURED, ("torch", "deepspeed")),
        tables={"kills.csv": kills},
        figures={"goodput.png": _draw(kills, attempts, totals)},
    )


def _draw(kills: Sequence[Kill], attempts: Sequence[Attempt], totals: Totals) -> Figure:
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    for attempt in attempts:
        minutes = [step.at / 60 for step in attempt.steps]
        axes.plot(minutes, [step.step for step in attempt.steps], color=LINEAR)
    for label, colour in (("a rank", COLOURS[3]), ("the launcher", SOFTMAX)):
        places = [k.at / 60 for k in kills if (k.victim == "launcher") == (colour == SOFTMAX)]
        axes.vlines(
            places,
            *(0, 1),
            transform=axes.get_xaxis_transform(),
            color=colour,
            linewidth=0.8,
            label=f"{label} is killed",
        )
    dress(axes, f"goodput {totals.goodput:.0%}", xlabel="wall time, minutes", ylabel="step")
    add_legend(axes)
    return figure


def _middle_and_most(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}, {max(values):.3g}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())

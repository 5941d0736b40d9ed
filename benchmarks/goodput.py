"""What failures cost: ``python -m benchmarks.goodput [--minutes 30] [key=value ...]``.

Trains the embedded model on two gloo ranks under ``linclip_launch.supervise``, and kills a rank,
now and then the launcher, at random times. Then reports, for every kill, the seconds until the
next step was done and how many steps were done again; and of the whole run goodput, the share of
its time that went into steps that counted, and whether every step and every sample was counted
once. Exit code 1 when one was not.
"""

import argparse
import csv
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import matplotlib.pyplot as plt

from benchmarks import REPOSITORY
from ds_linclip.config import Config, load_config
from ds_linclip.data import Storage, TrainData, find_shards
from ds_linclip.data.tar_index import OpenShard
from ds_linclip.provenance import commit_of, device_name, folder_name
from linclip_launch.supervise import is_running, launcher_and_ranks

EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"
RANKS = 2
LAUNCHER_SHARE = 0.2  # of the kills
MEASURED = ["ds_linclip", "launch", "kernels/linclip_kernels"]


@dataclass
class Kill:
    """A line of ``kills.csv``; times in seconds since the start of the run.

    Attributes:
        at: When.
        victim: "rank N" or "launcher".
        step: Last step that was done before.
        resumed_from: Step of the checkpoint the run went on from.
        steps_repeated: Done before and done again.
        seconds_to_step: Until the next step was done; None when the run was killed again before.
    """

    at: float
    victim: str
    step: int
    resumed_from: int | None = None
    steps_repeated: int | None = None
    seconds_to_step: float | None = None


@dataclass(frozen=True)
class Step:
    """A step that was seen in the log; seconds since the start of the run."""

    at: float
    step: int
    loss: float


@dataclass(frozen=True)
class Totals:
    """Of the whole run, in seconds but for the counts."""

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
    folder = arguments.out or REPOSITORY / "docs/results/goodput" / folder_name(device_name("cpu"))
    with tempfile.TemporaryDirectory(prefix="goodput-") as output:
        common = [
            *arguments.overrides,
            "eval.data=null",
            "log.every_steps=1",
            f"output_dir={output}",
        ]
        common += ["log.tensorboard=false", "log.sample_keys=true", "optim.warmup_steps=10"]
        speed = _reference(common)
        num_steps = max(20, round(60 * arguments.minutes / speed))
        every = max(1, round(arguments.seconds_between_saves / speed))
        print(
            f"{speed:.3f} s per step undisturbed: {num_steps} steps, saved every {every}",
            flush=True,
        )
        overrides = [*common, "name=killed", f"train.steps={num_steps}"]
        overrides += [f"checkpoint.every_steps={every}"]
        config = load_config(EMBEDDED, overrides)
        kills, steps, wall = _killed_run(config, overrides, arguments)
        attempts = _attempts(config, kills, steps)
        totals = _totals(attempts, wall)
        problems = _problems(config, attempts)
    write(folder, arguments, kills, attempts, totals, problems, every)
    print((folder / "summary.md").read_text())
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for the embedded config, such as data.train")
    parser.add_argument("--minutes", type=float, default=30.0, help="of steps, without failures")
    parser.add_argument("--mean-minutes-between-kills", type=float, default=2.0)
    parser.add_argument("--seconds-between-saves", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of times and victims")
    parser.add_argument("--out", type=Path, help="folder for table and picture")
    return parser


def _supervise(overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "linclip_launch.supervise",
        "--ranks",
        RANKS,
        "--max-restarts",
        20,
    ]
    command += ["--backoff-seconds", 1, EMBEDDED, *overrides]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen([str(part) for part in command], env=environment, cwd=REPOSITORY)


def _reference(common: Sequence[str]) -> float:
    """Seconds per step of a short run that nobody disturbs."""
    overrides = [*common, "name=reference", "train.steps=60"]
    if _supervise(overrides).wait() != 0:
        raise RuntimeError("the undisturbed run has failed")
    records = _Log(load_config(EMBEDDED, overrides).run_dir / "metrics.jsonl").read()
    return statistics.median(record["perf/seconds_per_step"] for record in records[10:])


class _Log:
    """Reads a growing file of JSON lines, which a start of the run may cut back first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._kept: list[bytes] = []

    def read(self) -> list[dict]:
        """The lines that have come since the last call."""
        seen = self._whole_lines()
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._file.close()  # cut back: another file is in its place
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
        """What follows in the open file, up to the last end of a line."""
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
    """Run to the end and kill on the way; kills, steps in the order they were done, seconds."""
    chance = random.Random(arguments.seed)
    mean = 60 * arguments.mean_minutes_between_kills
    log, kills, steps = _Log(config.run_dir / "metrics.jsonl"), [], []
    start = time.time()
    next_kill = chance.expovariate(1 / mean)
    supervisor = _supervise(overrides)
    try:
        while supervisor.poll() is None:
            now = time.time() - start
            steps += [Step(now, each["step"], each["train/loss"]) for each in log.read()]
            if now >= next_kill:
                kill = _kill(supervisor.pid, chance, start)
                if kill:
                    time.sleep(0.3)  # for a step that the others were about to log
                    steps += [
                        Step(kill.at, each["step"], each["train/loss"]) for each in log.read()
                    ]
                    kill.step = steps[-1].step if steps else 0
                    kills.append(kill)
                next_kill = now + (chance.expovariate(1 / mean) if kill else 0.5)
            time.sleep(0.02)
    finally:
        supervisor.terminate()
    if supervisor.returncode != 0:
        raise RuntimeError(f"the run has ended with exit code {supervisor.returncode}")
    wall = time.time() - start
    steps += [Step(wall, each["step"], each["train/loss"]) for each in log.read()]
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


def _kill(supervisor: int, chance: random.Random, start: float) -> Kill | None:
    """Kill a rank or the launcher; None when there is none, between two starts."""
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
    """The steps of one start of the run, and how many of them counted: up to ``last``."""

    steps: list[Step]
    last: int


def _attempts(config: Config, kills: Sequence[Kill], steps: Sequence[Step]) -> list[Attempt]:
    """Cut the log into starts of the run; notes in ``kills`` which steps were done again."""
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
    """A step lasts from the one before to its own end, with a save between them if there is one;
    the first after a start, whose beginning nobody sees, as long as the median step."""
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
    """What was lost, counted twice, or not the same when done again; in words."""
    wanted = list(range(1, config.train.steps + 1))
    counted = [s.step for attempt in attempts for s in attempt.steps if s.step <= attempt.last]
    problems = [] if counted == wanted else ["steps that counted are not 1, 2, 3, ..."]
    losses = defaultdict(set)
    for step in (step for attempt in attempts for step in attempt.steps):
        losses[step.step].add(step.loss)
    differing = [step for step, values in losses.items() if len(values) > 1]
    if differing:
        problems.append(f"loss of steps {differing[:5]} was not the same when done again")
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
    """Keys by step and rank, from the pure order and the tars alone."""
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
    arguments: argparse.Namespace,
    kills: Sequence[Kill],
    attempts: Sequence[Attempt],
    totals: Totals,
    problems: Sequence[str],
    every: int,
) -> None:
    """``kills.csv``, ``summary.md`` and ``goodput.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kills.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Kill))
        writer.writerows(asdict(kill).values() for kill in kills)
    times = [kill.seconds_to_step for kill in kills if kill.seconds_to_step is not None]
    repeated = [kill.steps_repeated for kill in kills if kill.steps_repeated is not None]
    down = totals.wall - totals.counted - totals.repeated
    lines = [
        "# Goodput under random kills",
        "",
        f"`python -m benchmarks.goodput --minutes {arguments.minutes:g} "
        f"--mean-minutes-between-kills "
        f"{arguments.mean_minutes_between_kills:g} --seed {arguments.seed}` on "
        f"{device_name('cpu')}, {time.strftime('%Y-%m-%d', time.gmtime())}, commit "
        f"{commit_of(MEASURED)}: {RANKS} gloo ranks, saved every {every} steps.",
        "",
        "| | |",
        "|:---|---:|",
        f"| wall time, s | {totals.wall:.0f} |",
        f"| kills of a rank, of the launcher | {sum(k.victim != 'launcher' for k in kills)}, "
        f"{sum(k.victim == 'launcher' for k in kills)} |",
        f"| **goodput**: time in steps that counted, saves included | {totals.goodput:.1%} |",
        f"| time in steps that were done again | {totals.repeated / totals.wall:.1%} |",
        f"| time down: noticing, starting, loading | {down / totals.wall:.1%} |",
        f"| steps that counted, done again | {totals.steps}, {totals.steps_repeated} |",
        f"| from a kill to the next step, median and most, s | {_middle_and_most(times)} |",
        f"| steps done again per kill, median and most | {_middle_and_most(repeated)} |",
        f"| steps or samples lost, doubled or changed | {'; '.join(problems) or 'none'} |",
        "",
        "Every line of the sample log is compared with the order computed from seed and shards;",
        "losses of steps that were done again must be bitwise what they were.",
    ]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for attempt in attempts:
        minutes = [step.at / 60 for step in attempt.steps]
        axes.plot(minutes, [step.step for step in attempt.steps], color="tab:blue")
    for kill in kills:
        colour = "tab:orange" if kill.victim == "launcher" else "tab:red"
        axes.axvline(kill.at / 60, color=colour, linewidth=0.8)
    axes.plot([], color="tab:red", label="a rank is killed")
    axes.plot([], color="tab:orange", label="the launcher is killed")
    axes.set_xlabel("wall time, minutes")
    axes.set_ylabel("step")
    axes.set_title(f"goodput {totals.goodput:.0%}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "goodput.png", dpi=130)
    plt.close(figure)


def _middle_and_most(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}, {max(values):.3g}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())

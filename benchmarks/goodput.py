"""The cost of failures: ``python -m benchmarks.goodput [--minutes 30] [key=value ...]``.

Trains the embedded model on two gloo ranks under ``linclip train --supervise``, and kills a rank,
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
from typing import Any

from matplotlib.figure import Figure

from benchmarks import REPOSITORY, BenchmarkParser
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


@dataclass
class Step:
    """A step in the log.

    Attributes:
        at: Time when it was seen, in seconds since the start of the run.
        counts: Whether no kill undid it.
        seconds: Time since the step before, saves included; None for the first after a start.
    """

    at: float
    step: int
    loss: float
    counts: bool = True
    seconds: float | None = None


def main() -> int:
    parser = BenchmarkParser("goodput", __doc__, "--out")
    parser.add_argument("overrides", nargs="*", help="for the embedded config, such as data.train")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, without failures")
    parser.add_argument("--mean-minutes-between-kills", type=float, default=2.0)
    parser.add_argument("--seconds-between-saves", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="for times and victims")
    arguments = parser.parse_intermixed_args()
    folder, facts = parser.begin(arguments, "cpu", MEASURED, ("torch", "deepspeed"))
    with tempfile.TemporaryDirectory(prefix="goodput-") as output:
        common = [*arguments.overrides, "eval.data=null", f"output_dir={output}"]
        common += ["log.every_steps=1", "log.tensorboard=false", "log.sample_keys=true"]
        common += ["optim.warmup_steps=10"]
        speed = _reference(common)
        num_steps = max(20, round(60 * arguments.minutes / speed))
        every = max(1, round(arguments.seconds_between_saves / speed))
        plan = f"{num_steps} steps, saved every {every}"
        print(f"{speed:.3f} s per step without kills: {plan}", flush=True)
        overrides = [*common, "name=killed", f"train.steps={num_steps}"]
        overrides += [f"checkpoint.every_steps={every}"]
        config = load_config(EMBEDDED, overrides)
        kills, steps, wall = _killed_run(config, overrides, arguments)
        problems = _problems(config, steps)
    facts["saved every"] = f"{every} steps"
    print(write(folder, facts, kills, steps, wall, problems))
    return 1 if problems else 0


def _supervise(overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "linclip_launch", "train", str(EMBEDDED), *overrides]
    command += ["--ranks", str(RANKS), "--supervise"]
    command += ["--max-restarts", "20", "--backoff-seconds", "1"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


def _reference(common: Sequence[str]) -> float:
    """Return the seconds per step of a short run without kills."""
    overrides = [*common, "name=reference", "train.steps=60"]
    if _supervise(overrides).wait() != 0:
        raise RuntimeError("the run without kills failed")
    records = _records_after([], load_config(EMBEDDED, overrides).run_dir / "metrics.jsonl")
    return statistics.median(record["perf/seconds_per_step"] for record in records[10:])


def _records_after(seen: list[bytes], path: Path) -> list[dict[str, Any]]:
    """Return the lines of a growing file that are not in ``seen``, and keep its lines there.

    A restart of the run removes the last lines of its log.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    pairs = zip(seen, lines, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    seen[:] = lines
    return [json.loads(line) for line in lines[shared:]]


def _killed_run(
    config: Config, overrides: Sequence[str], arguments: argparse.Namespace
) -> tuple[list[Kill], list[Step], float]:
    """Run to the end with kills; return kills, steps in the order of the log, and seconds."""
    chance = random.Random(arguments.seed)
    mean = 60 * arguments.mean_minutes_between_kills
    kills: list[Kill] = []
    steps: list[Step] = []
    seen: list[bytes] = []

    def look(at: float) -> None:
        records = _records_after(seen, config.run_dir / "metrics.jsonl")
        steps.extend(Step(at, record["step"], record["train/loss"]) for record in records)

    start = time.time()
    next_kill = chance.expovariate(1 / mean)
    supervisor = _supervise(overrides)
    try:
        while supervisor.poll() is None:
            now = time.time() - start
            look(now)
            if now >= next_kill:
                kill = _kill(supervisor.pid, chance, start)
                if kill:
                    time.sleep(0.3)  # for a step that the others were about to log
                    look(kill.at)
                    kill.step = steps[-1].step if steps else 0
                    kills.append(kill)
                next_kill = now + (chance.expovariate(1 / mean) if kill else 0.5)
            time.sleep(0.02)
    finally:
        supervisor.terminate()
    if supervisor.returncode != 0:
        raise RuntimeError(f"the run ended with exit code {supervisor.returncode}")
    wall = time.time() - start
    look(wall)
    restarts = _records_after([], config.run_dir / "restarts.jsonl")
    _judge(kills, steps, [(each["time"] - start, each["step"]) for each in restarts])
    return kills, steps, wall


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


def _judge(
    kills: Sequence[Kill], steps: Sequence[Step], restarts: Sequence[tuple[float, int]]
) -> None:
    """Set what followed each kill, which steps counted, and how long each took.

    ``restarts`` has the time of each, and the step that it resumed from.
    """
    begin = 0.0
    for kill in kills:
        later = [restart for restart in restarts if restart[0] > kill.at]
        if not later:  # killed just as the run ended
            continue
        again, last = later[0]
        until = later[1][0] if len(later) > 1 else float("inf")
        done = [step.at for step in steps if again < step.at < until]
        undone = [step for step in steps if begin < step.at <= kill.at and step.step > last]
        for step in undone:
            step.counts = False
        kill.resumed_from, kill.steps_repeated = last, len(undone)
        kill.seconds_to_step = done[0] - kill.at if done else None
        begin = kill.at
    for before, after in itertools.pairwise(steps):
        if not any(before.at <= kill.at < after.at for kill in kills):
            after.seconds = after.at - before.at


def _problems(config: Config, steps: Sequence[Step]) -> list[str]:
    """Describe what was lost, counted twice, or different when repeated."""
    wanted = list(range(1, config.train.steps + 1))
    counted = [step.step for step in steps if step.counts]
    problems = [] if counted == wanted else ["steps that counted are not 1, 2, 3, ..."]
    losses = defaultdict(set)
    for step in steps:
        losses[step.step].add(step.loss)
    differing = [number for number, values in losses.items() if len(values) > 1]
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
    facts: dict[str, str],
    kills: Sequence[Kill],
    steps: Sequence[Step],
    wall: float,
    problems: Sequence[str],
) -> str:
    """Write kills.csv, goodput.png and summary.md, whose text is returned."""
    # A first step after a start, whose beginning is not in the log, has the median time.
    median = statistics.median(step.seconds for step in steps if step.seconds is not None)
    counted, undone = (
        [step.seconds or median for step in steps if step.counts == counts]
        for counts in (True, False)
    )
    goodput, repeated = sum(counted) / wall, sum(undone) / wall
    times = [kill.seconds_to_step for kill in kills if kill.seconds_to_step is not None]
    repeats = [kill.steps_repeated for kill in kills if kill.steps_repeated is not None]
    launchers = sum(kill.victim == "launcher" for kill in kills)
    figures = {
        "wall time, s": f"{wall:.0f}",
        "kills of a rank, of the launcher": f"{len(kills) - launchers}, {launchers}",
        "goodput: time in steps that counted, saves included": f"{goodput:.1%}",
        "time in steps that were repeated": f"{repeated:.1%}",
        "time down: noticing, starting, loading": f"{1 - goodput - repeated:.1%}",
        "steps that counted, repeated": f"{len(counted)}, {len(undone)}",
        "from a kill to the next step, median and most, s": _middle_and_most(times),
        "steps repeated per kill, median and most": _middle_and_most(repeats),
        "steps or samples lost, doubled or changed": "; ".join(problems) or "none",
    }
    return write_report(
        folder,
        title="Goodput under random kills",
        sections=[
            f"{RANKS} gloo ranks.",
            markdown_table(["", ""], list(figures.items())),
            "Every line of the sample log is compared with the order computed from seed and "
            "shards; losses of steps that were repeated must be bitwise what they were.",
            "![Steps over wall time](goodput.png)",
        ],
        facts=facts,
        tables={"kills.csv": kills},
        figures={"goodput.png": _draw(kills, steps, f"goodput {goodput:.0%}")},
    )


def _draw(kills: Sequence[Kill], steps: Sequence[Step], title: str) -> Figure:
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    starts = [i for i, step in enumerate(steps) if step.seconds is None]
    for begin, end in itertools.pairwise([*starts, len(steps)]):
        piece = steps[begin:end]
        axes.plot([s.at / 60 for s in piece], [s.step for s in piece], color=LINEAR)
    for is_launcher, colour in ((False, COLOURS[3]), (True, SOFTMAX)):
        label = f"{'the launcher' if is_launcher else 'a rank'} is killed"
        places = [k.at / 60 for k in kills if (k.victim == "launcher") == is_launcher]
        # From the bottom to the top of the panel.
        style = {"transform": axes.get_xaxis_transform(), "linewidth": 0.8}
        axes.vlines(places, 0, 1, color=colour, label=label, **style)
    dress(axes, title, xlabel="wall time, minutes", ylabel="step")
    add_legend(axes)
    return figure


def _middle_and_most(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}, {max(values):.3g}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())

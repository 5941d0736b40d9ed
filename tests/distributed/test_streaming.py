"""Training that is killed and resumed on other numbers of ranks: every sample once per epoch."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from ds_linclip.config import Config, load_config
from ds_linclip.data.prepare.shard_writer import RawSample, write_train_shard
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.killed_runs import batches, losses
from linclip_launch.supervise import launcher_and_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow]
TRAIN = "linclip_launch.train"
#: 100 uneven shards, 600 samples: 25 steps of 24 per epoch.
SIZES = [4 + number % 5 for number in range(100)]
BATCH = 24
EPOCH = sum(SIZES) // BATCH
STEPS = 2 * EPOCH


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[object]:
    """Return the command line of a tiny run over the shards, with two workers per rank."""
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate(SIZES):
        colours = [(number * 2, index * 9, 128) for index in range(size)]
        images = [Image.new("RGB", (16, 16), colour) for colour in colours]
        samples = [
            RawSample(image, f"shade {image.getpixel((0, 0))}", "none", (16, 16))
            for image in images
        ]
        write_train_shard(folder, number, [sample.encode() for sample in samples])
    return [
        *(TRAIN, EMBEDDED, f"data.train=['{folder}/{{00000..00099}}.tar']", "eval.data=null"),
        *("data.num_workers=2", "data.num_lanes=8", "data.shuffle_shards=3"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *(f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "optim.warmup_steps=4"),
        *("checkpoint.every_steps=10", "log.every_steps=1", "log.sample_keys=true"),
        "log.tensorboard=false",
    ]


def kill_a_rank_after(step: int, run: Path, running: subprocess.Popen) -> None:
    """Kill -9 the last rank some steps after the checkpoint of ``step``."""
    latest, metrics = run / "checkpoints" / "latest", run / "metrics.jsonl"
    while not latest.exists() or latest.read_text() < f"step-{step:08d}":
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    while f'{{"step": {step + 2}, ' not in metrics.read_text():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    os.kill(max(launcher_and_ranks(running.pid)[1]), signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode != 0


def on_so_many_ranks(config: Config) -> None:
    mesh = Mesh.create(config.parallel)
    train(config, mesh)
    mesh.close()


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """Return the largest relative difference of the loss over all steps."""
    assert sorted(one) == sorted(other)
    return max(abs(other[step] / one[step] - 1) for step in one)


@pytest.mark.parametrize(
    ("precision", "stage", "rounding", "ranks"),
    [
        ("fp32", 1, 1e-5, (2, 3, 2)),
        ("fp32", 1, 1e-5, (4, 2, 3, 4)),
        ("bf16", 2, 2**-8, (4, 2, 3, 4)),
    ],
)
def test_epoch_audit(
    precision, stage, rounding, ranks, arguments, start_deepspeed_cpu, deepspeed_cpu, tmp_path
):
    """A run that is killed and resumed on more or fewer ranks equals an uninterrupted one.

    Steps after a checkpoint are repeated by another number of ranks: their losses agree but for
    rounding. The losses of all steps agree with those of a run that was never killed: in fp32 to
    rounding; in bf16, where runs on different numbers of ranks soon diverge, as closely as two such
    runs that were never killed.
    """
    form = [f"train.precision={precision}", f"zero.stage={stage}", f"output_dir={tmp_path}"]
    script, config, *overrides = [*arguments, *form]
    train(load_config(config, [*overrides, "name=whole"]), Mesh.create())  # one rank, this process
    run = tmp_path / "resumed"
    *killed, last = ranks
    for kill, number in enumerate(killed, start=1):
        running = start_deepspeed_cpu(script, config, *overrides, "name=resumed", ranks=number)
        kill_a_rank_after(10 * kill, run, running)
    done = deepspeed_cpu(script, config, *overrides, "name=resumed", ranks=last)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"step-000000\d0: from .*'dp': {killed[-1]}.* to .*'dp': {last}", done.stderr)

    found, starts = batches(run)
    assert [number for _, number in sorted(starts)] == list(ranks)
    assert sorted(found) == list(range(1, STEPS + 1))
    everything = {f"{n:05d}{i:04d}" for n, size in enumerate(SIZES) for i in range(size)}
    epochs = []
    for epoch in range(2):
        steps = range(epoch * EPOCH + 1, (epoch + 1) * EPOCH + 1)
        keys = [key for step in steps for key in found[step]]
        assert set(Counter(keys).values()) == {1}
        assert set(keys) == everything
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    assert found == batches(tmp_path / "whole")[0]

    resumed, undone = losses(run), losses(run, "metrics_undone.jsonl")
    redone = {step: resumed[step] for step in undone}
    assert {10 * kill + ahead for kill in range(1, len(ranks)) for ahead in (1, 2)} <= set(redone)
    assert apart(undone, redone) <= rounding
    limit = rounding
    if precision == "bf16":
        never_killed = [losses(tmp_path / "whole")]
        for number in sorted(set(ranks)):
            more = [f"name=on-{number}", "data.num_workers=0"]  # daemons may not have children
            run_ranks(number, on_so_many_ranks, load_config(config, [*overrides, *more]))
            never_killed.append(losses(tmp_path / f"on-{number}"))
        limit = max(apart(one, other) for one, other in combinations(never_killed, 2))
    worst = apart(losses(tmp_path / "whole"), resumed)
    print(
        f"{precision} ZeRO-{stage}: redone {apart(undone, redone):.1e}, {worst:.1e} <= {limit:.1e}"
    )
    assert worst <= limit
    report = json.loads((run / "data_report.json").read_text())
    assert (report["step"], report["samples"]) == (STEPS, BATCH * STEPS)
    assert not list((run / "checkpoints").glob("*.tmp"))

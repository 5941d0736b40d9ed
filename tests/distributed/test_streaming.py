"""Killed, resumed on other numbers of ranks: every sample once per epoch, and the same losses."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ds_linclip.data.shard_writer import RawSample, write_train_shard

pytestmark = pytest.mark.distributed
JOB = Path(__file__).with_name("streaming_job.py")
REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "launch" / "train.py"
EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"
NUM_SHARDS = 100
#: Uneven: 2,400 samples, 50 steps per epoch.
SIZES = [20 + number % 9 for number in range(NUM_SHARDS - 1)] + [24]
EPOCH = sum(SIZES) // 48
STEPS = 2 * EPOCH


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    image = Image.new("RGB", (16, 16), "teal")
    for number, size in enumerate(SIZES):
        sample = RawSample(image, "a teal square", "none", (16, 16)).encode()
        write_train_shard(folder, number, [sample] * size)
    return folder


def kill_a_rank_at(step: int, folder: Path, running: subprocess.Popen) -> None:
    """Kill -9 rank 1 once the job has read the batch of ``step``."""
    deadline = time.monotonic() + 120
    while not any(f"\n{step} " in log.read_text() for log in folder.glob("from*_rank1of*")):
        assert running.poll() is None, "the job ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode != 0


def keys_by_step(folder: Path) -> dict[int, list[str]]:
    """Keys of every global batch; of steps that were lost and done again, the last time counts."""
    logs = sorted(folder.glob("from*"), key=lambda path: re.findall(r"\d+", path.name))
    runs: dict[int, dict[int, list[str]]] = {}
    for log in logs:
        begun = int(re.match(r"from(\d+)", log.name)[1])
        for line in log.read_text().splitlines():
            step, *keys = line.split()
            runs.setdefault(begun, {}).setdefault(int(step), []).extend(keys)
    merged: dict[int, list[str]] = {}
    for begun in sorted(runs):
        merged.update(runs[begun])
    return merged


def test_every_sample_once_per_epoch_through_kills_and_changes_of_ranks(
    shards, start_deepspeed_cpu, deepspeed_cpu, tmp_path
):
    arguments = [JOB, tmp_path, f"{shards}/{{00000..{NUM_SHARDS - 1:05d}}}.tar", STEPS]
    for ranks, kill_at in ((4, 22), (2, 48), (3, 71)):
        kill_a_rank_at(kill_at, tmp_path, start_deepspeed_cpu(*arguments, ranks=ranks))
    done = deepspeed_cpu(*arguments, ranks=4)
    assert done.returncode == 0, done.stderr

    batches = keys_by_step(tmp_path)
    assert sorted(batches) == list(range(STEPS))
    everything = {f"{n:05d}{i:04d}" for n, size in enumerate(SIZES) for i in range(size)}
    epochs = []
    for epoch in range(2):
        keys = [key for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for key in batches[step]]
        assert set(Counter(keys).values()) == {1}
        assert set(keys) == everything
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    # Steps that were read by two numbers of ranks, before and after a kill, had the same batch.
    began = {int(re.match(r"from(\d+)", log.name)[1]) for log in tmp_path.glob("from*")}
    assert len(began) == 4
    for log in tmp_path.glob("from*"):
        for line in log.read_text().splitlines()[:-1]:  # the last one may be cut by the kill
            step, *keys = line.split()
            assert set(keys) <= set(batches[int(step)])


def ranks_of(launcher: int) -> list[int]:
    """Processes that run the training script below the launcher."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = []
    for process, command in commands.items():
        above = process
        while above in parents and above != launcher:
            above = parents[above]
        if above == launcher and any(b"--local_rank" in word for word in command):
            found.append(process)
    return found


@pytest.mark.parametrize("form", [("fp32", 1), pytest.param(("bf16", 2), marks=pytest.mark.slow)])
def test_losses_go_on_through_kills_and_changes_of_ranks(
    form, start_deepspeed_cpu, deepspeed_cpu, embedded_overrides, tmp_path
):
    precision, stage = form
    arguments = [
        *(TRAIN, EMBEDDED, *embedded_overrides, f"output_dir={tmp_path}", "eval.data=null"),
        *(
            "train.steps=32",
            "optim.warmup_steps=4",
            "checkpoint.every_steps=6",
            "log.every_steps=1",
        ),
        *("train.global_batch_size=32", f"train.precision={precision}", f"zero.stage={stage}"),
    ]
    assert deepspeed_cpu(*arguments, "name=whole", ranks=2).returncode == 0
    latest = tmp_path / "resumed" / "checkpoints" / "latest"
    for ranks, step in ((4, 6), (2, 12), (1, 18)):
        running = start_deepspeed_cpu(*arguments, "name=resumed", ranks=ranks)
        while not latest.exists() or latest.read_text() < f"step-{step:08d}":
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        os.kill(max(ranks_of(running.pid)), signal.SIGKILL)
        running.communicate(timeout=60)
        assert running.returncode != 0
    done = deepspeed_cpu(*arguments, "name=resumed", ranks=4)
    assert done.returncode == 0, done.stderr
    assert "from 1 ranks to 4" in done.stderr

    def losses(name: str) -> dict[int, float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["train/loss"] for record in map(json.loads, lines)}

    whole, resumed = losses("whole"), losses("resumed")
    assert sorted(resumed) == sorted(whole) == list(range(1, 33))
    worst = max(abs(resumed[step] / whole[step] - 1) for step in whole)
    print(f"{precision} ZeRO-{stage}: largest relative difference of the loss {worst:.1e}")
    assert worst <= {"fp32": 1e-5, "bf16": 5e-3}[precision]
    report = json.loads((tmp_path / "resumed" / "data_report.json").read_text())
    assert (report["step"], report["samples"]) == (32, 32 * 32)
    assert not list(latest.parent.glob("*.universal"))

"""``linclip plan`` for absent devices: figures, one error per mistake."""

import json
import re
import subprocess
import sys

import pytest

from helpers import REPOSITORY, job_environment

pytestmark = pytest.mark.long

CONFIGS = REPOSITORY / "ds_configs" / "train"
LARGE = [str(CONFIGS / "vit_l16.yaml"), "--num-samples", "407332084"]
#: A model with enough layers to tell stages apart, planned in a moment.
SMALL = [
    *(str(CONFIGS / "embedded.yaml"), "parallel.device=cuda"),
    *("--num-samples", "1437", "--device", "h100"),
]
RUNS = {
    "l16 on 512": [*LARGE, "--devices", "512", "--device", "h100"],
    "l16 on a100": [*LARGE, "--devices", "512", "--device", "a100", "--mfu", "0.5"],
    "l16 too large": [
        *(*LARGE, "train.activation_checkpointing=none"),
        *("--devices", "64", "--device", "h100"),
    ],
    "all axes": [
        *(*SMALL, "--devices", "16", "train.micro_batch_size=4"),
        *("parallel.tp=2", "parallel.pp=2", "parallel.cp=2"),
    ],
    "no such device": [*SMALL, "--device", "h1000"],
    "devices": [*SMALL, "--devices", "6", "parallel.tp=2", "parallel.pp=2"],
    "no devices": [*SMALL, "--devices", "0"],
    "batch": [*SMALL, "--devices", "3"],
    "micro-batch": [*SMALL, "--devices", "2", "train.micro_batch_size=60"],
    "mfu": [*SMALL, "--mfu", "35"],
    "memory": [*SMALL, "--device-memory-gib", "4.1", "zero.stage=1"],
}
ERRORS = {
    "l16 too large": r"rank 0 needs [\d.]+ GiB .* at most the 75\.6 GiB .*\(h100\).* largest part "
    r"is activations \([\d.]+ GiB\): change train\.micro_batch_size .*activation_checkpointing",
    "no such device": r"--device \(h1000\) must be one of h100, h200, a100",
    "devices": r"parallel\.tp \(2\) x .* = 4 must divide the number of ranks \(6\)",
    "no devices": r"argument --devices: must be a whole number >= 1, not '0'",
    "batch": r"train\.global_batch_size \(128\) must be a positive multiple .*\(3\): 126 or 129",
    "micro-batch": r"train\.micro_batch_size \(60\) must divide a rank's part of the batch",
    "mfu": r"--mfu \(35\.0\) must be at most 1",
    "memory": r"rank 0 needs .* at most the 0\.1 GiB",
}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "helpers.plan_job"],
        input=json.dumps(list(RUNS.values())),
        env=job_environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return dict(zip(RUNS, json.loads(done.stdout.splitlines()[-1]), strict=True))


def cells(line):
    return [cell.strip() for cell in line.split("|")]


def table(out):
    """Return the rows of the plan as mappings."""
    header, _, *rows = (line for line in out.splitlines() if " | " in line)
    return [dict(zip(cells(header), cells(row), strict=True)) for row in rows]


def test_figures_follow_from_the_config(found):
    code, out, err = found["l16 on 512"]
    assert code == 0, err
    assert "- batch: 32,768 pairs: 512 data-parallel places x a micro-batch of 64" in out
    assert "- epoch: 407,332,084 samples, 12,430.8 steps" in out
    # 12 bytes for each of 427,680,257 parameters.
    assert "- checkpoint: 4.78 GiB on disk" in out
    (row,) = table(out)
    assert row["ranks"] == "0-511"
    parts = ("weights", "gradients", "optimizer", "buckets", "activations")
    together = sum(float(row[f"{part}, GiB"]) for part in parts)
    assert float(row["together, GiB"]) == pytest.approx(together, rel=0.02)


def test_time_follows_from_operations_peak_and_mfu(found):
    operations, seconds = (
        float(re.search(pattern, found["l16 on a100"][1])[1])
        for pattern in (r"step: ([\d.]+) PFLOP", r"recomputed: ([\d.e-]+) s at 0.5 of 312 TFLOP")
    )
    assert seconds == pytest.approx(operations * 1e15 / (512 * 312e12 * 0.5), rel=0.01)


def test_every_distinct_rank_has_a_row(found):
    code, out, err = found["all axes"]
    assert code == 0, err
    rows = {row["ranks"]: row for row in table(out)}
    # Tensor innermost, then context, data, pipeline; the first context rank has one token more.
    assert list(rows) == ["0-1, 4-5", "2-3, 6-7", "8-9, 12-13", "10-11, 14-15"]
    first, *_, last = rows.values()
    assert first["layers"].startswith("image embedding")
    assert last["layers"].endswith("text head")
    assert float(first["pp, MiB/step"]) > 0


@pytest.mark.parametrize("name", ERRORS)
def test_plan_that_cannot_run_is_refused_in_one_line(found, name):
    code, _, err = found[name]
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(ERRORS[name], errors[0])
    assert "Traceback" not in err

"""Memory of real steps against the plan, with activations; see step_memory_job.py."""

import json
import subprocess
import sys

import pytest

from benchmarks.attention.zoo import ZOO
from helpers import job_environment

QUICK = ["long-eq4-selective", "zero3-softmax", "pp2-micro", "zero2-amp"]
SLOW = [
    *("bf16", "long-softmax-full", "zero2-micro", "tp2-full"),
    *("fp32-selective", "long-full", "zero1-micro", "zero1-softmax-full", "lamb"),
    *("zero2-full", "zero3-micro", "tp2-softmax", "pp2-full", "cp2-long"),
    *("zero1", "zero1-micro-bf16-sums", "zero3", "pp2-amp-micro"),
    *("long-luna", "long-luna-selective", "long-luna-full", "zero3-luna"),
    *("long-hedgehog", "tp2-hedgehog"),
    "inline-selective",
    *("frequency-selective", "frequency-amp", "long-frequency-tokens"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "names", [QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in (SLOW, list(ZOO)))]
)
def test_peak_memory_of_a_step_is_as_planned(tmp_path, names):
    done = subprocess.run(
        [sys.executable, "-m", "helpers.step_memory_job", str(tmp_path), *names],
        env=job_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == names
    apart = {
        name: [planned / measured - 1 for measured, planned in ranks]
        for name, ranks in found.items()
    }
    assert all(abs(each) <= 0.1 for ranks in apart.values() for each in ranks), apart

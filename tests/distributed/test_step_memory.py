"""Memory of real steps against the plan, activations included; see step_memory_job.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("step_memory_job.py")
REPOSITORY = JOB.parents[2]
QUICK = ["long-eq4-selective", "zero3-softmax", "pp2-micro"]
SLOW = [
    *("bf16", "long-softmax-full", "zero2-micro", "tp2-full"),
    *("fp32-selective", "long-full", "zero1-micro", "zero1-softmax-full", "lamb"),
    *("zero2-full", "zero3-micro", "tp2-softmax", "pp2-full", "cp2-long"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("names", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_a_step_takes_the_memory_that_is_planned(tmp_path, names):
    paths = [REPOSITORY / "launch", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
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

"""The Triton kernels on the CPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(speed: str) -> None:
    """Run triton_cases.py in processes where kernels are defined for the interpreter."""
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning"]
    halves = [
        subprocess.Popen(
            [*command, "-p", "no:cacheprovider", "-m", speed, "-k", half, str(cases)],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in ("causal-eq4", "not causal-eq4")
    ]
    for process in halves:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert "skipped" not in output, output

"""Device and commit of a benchmark, as the kernels' benchmarks, which stand alone, write them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "benchmarks"))

from bench_facts import commit_of, device_name, folder_name

__all__ = ["commit_of", "device_name", "folder_name"]

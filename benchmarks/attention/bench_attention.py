"""Linear attention against torch SDPA, an unfused torch form and flash-linear-attention.

``python -m benchmarks.attention.bench_attention [OUTPUT_FOLDER]`` checks the operator against its
definition and then, if it passes, measures time and memory over the number of tokens. It prints
summary.md and writes it, results.csv (one row per point, skipped ones with their reason) and
figure.png into OUTPUT_FOLDER. On a GPU that the model of the kernels' time knows, its prediction
stands beside every time of our operator. Exit codes: 0 measured, 1 the operator is wrong or has
failed, 2 bad arguments.
"""

import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import BenchmarkParser
from benchmarks.attention.operators import (
    FORMS,
    HEAD_DIM,
    Implementation,
    Operators,
    batch_and_heads,
)
from benchmarks.attention.prediction import predicted_seconds, speed_of
from benchmarks.attention.report import AttentionReport
from benchmarks.correctness import Check, check_tensors, output_and_gradients
from linclip_eval.runtime.fit import RuntimePoint
from linclip_eval.runtime.measure import FAILED, Limits, measure_in_turn
from linclip_kernels import linear_attention, linear_attention_reference
from linclip_kernels.linear_attention.reference import attend
from linclip_kernels.linear_attention.variant import Variant

MEASURED = ("kernels", "benchmarks/attention", "evaluation/linclip_eval/runtime")
TOKENS = (77, 197, 577, 1025, 4096, 16_384, 65_536, 262_144, 2**20, 2**22)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
#: Lengths of the correctness check; measured lengths up to the limit come in addition.
CHECK_TOKENS = (15, 77, 197, 1025)
CHECK_LIMIT = {"cuda": 4096, "cpu": 1025}
#: Size of the copy that gives the bandwidth; far beyond any cache.
COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
_COMMON = Limits(
    runs=100,
    warmup=10,
    max_seconds_per_point=1.0,
    max_seconds_per_call=15.0,
    graph_below_seconds=5e-3,
    quantiles=(0.2, 0.8),
)
#: A graph takes long to capture, so that there is one pass on a GPU.
LIMITS = {"cuda": replace(_COMMON, passes=1, runs=1000, max_seconds_per_point=0.2), "cpu": _COMMON}


def main() -> int:
    start = time.monotonic()
    parser = BenchmarkParser("kernels", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--budget-seconds", type=float, default=420)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, on a CPU")
    parser.add_argument("--commit", help="what to record where the folder is no git checkout")
    arguments = parser.parse_args()
    device, tokens = arguments.device, sorted(set(arguments.tokens))
    if device not in DTYPE:
        parser.error(f"device ({device!r}) must be 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("device ('cuda') must be available: this machine has no CUDA device")
    parser.check_positive(arguments, "tokens", "budget_seconds", "threads")
    packages = ("torch", "triton", "flash-linear-attention")
    output, facts = parser.begin(arguments, device, MEASURED, packages)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    checks = check_forms(device, tokens)
    wrong = [check for check in checks if not check.passed]
    if wrong:
        print(f"error: {len(wrong)} of {len(checks)} checks failed: {wrong[0]}", file=sys.stderr)
        return 1
    dtype, bandwidth = DTYPE[device], copy_bandwidth(device)
    implementations = Implementation.available(device)
    facts |= {"commit": arguments.commit} if arguments.commit else {}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    facts["threads"] = str(arguments.threads)
    facts["copy bandwidth"] = f"{1e-9 * bandwidth:.4g} GB/s, read and written"
    workloads = (Operators(implementations, device, dtype, causal=c) for c in (False, True))
    deadline = start + arguments.budget_seconds
    points: list[RuntimePoint] = []
    summary = ""
    for points in measure_in_turn(workloads, 2, tokens, LIMITS[device], deadline=deadline):
        # Written after each workload, so that an interruption loses no more than one.
        facts["duration"] = f"{time.monotonic() - start:.0f} s"
        predicted = predicted_seconds(points, dtype, speed_of(device, bandwidth))
        report = AttentionReport(
            device, dtype, implementations, bandwidth, checks, points, predicted
        )
        summary = report.write(output, facts)
    print(summary)
    failed = [p for p in points if p.attention in FORMS and p.skipped.startswith(FAILED)]
    for point in failed:
        place = f"{point.attention}, {point.direction}, N = {point.num_tokens}"
        print(f"error: {place}: {point.skipped}", file=sys.stderr)
    return 1 if failed else 0


def check_forms(device: str, tokens: list[int]) -> list[Check]:
    """Check output and gradients of every measured form.

    The operator runs on inputs as they are timed; four of their heads are compared with the
    definition.
    """
    lengths = sorted({*CHECK_TOKENS, *(n for n in tokens if n <= CHECK_LIMIT[device])})
    checks = []
    for num_tokens, (name, form) in product(lengths, FORMS.items()):
        batch, heads = batch_and_heads(device, num_tokens)
        shape = batch, num_tokens, heads, 4, HEAD_DIM
        packed = torch.randn(shape, device=device, dtype=DTYPE[device])
        found = output_and_gradients(partial(linear_attention, **form), packed)
        packed = _corners(packed)
        exact = output_and_gradients(partial(linear_attention_reference, **form), packed.double())
        plain = output_and_gradients(partial(_definition, **form), packed)
        checks += check_tensors(name, num_tokens, [_corners(x) for x in found], plain, exact)
    return checks


def copy_bandwidth(device: str) -> float:
    """Return the bytes that a large copy reads and writes per second: the median of ten."""
    num_bytes = COPY_BYTES[device]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):  # the first two warm up
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * num_bytes / statistics.median(seconds[2:])


def _definition(q: Tensor, k: Tensor, v: Tensor, **form: Any) -> Tensor:
    return attend(q, k, v, Variant(**form))


def _corners(x: Tensor) -> Tensor:
    """Return the first and last head of the first and last batch, [2, N, 2, ...]."""
    return x[[0, -1]][:, :, [0, -1]]


if __name__ == "__main__":
    sys.exit(main())

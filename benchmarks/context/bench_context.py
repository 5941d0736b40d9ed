"""Cost and traffic of one attention layer when the tokens of an image are split over ranks.

``python -m benchmarks.context.bench_context [OUTPUT_FOLDER]`` starts a process per rank (nccl
between GPUs, gloo otherwise), checks that split attention computes what one rank computes, and
measures forward and backward over the number of tokens. It prints summary.md and writes it,
context.csv (one row per measurement and rank) and context.png into OUTPUT_FOLDER. Exit codes: 0
measured, 1 a result is wrong or a layer exchanges more or less than it should, 2 bad arguments.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import BenchmarkParser
from benchmarks.context.report import CHECK_TOKENS, HEAD_DIM, HEADS, ContextReport, Row
from benchmarks.correctness import Check, check_tensors, output_and_gradients
from benchmarks.peak_memory import PeakMemory
from benchmarks.traffic import TrafficMeter
from ds_linclip.parallel.context_parallel import sum_over_ranks, token_slice
from linclip_kernels import linear_attention, linear_attention_from_state, linear_attention_state

MEASURED = ("kernels/linclip_kernels", "benchmarks", "ds_linclip/parallel/context_parallel.py")
RANKS = (1, 2, 4)
TOKENS = (16_384, 32_768, 65_536, 131_072, 262_144)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def attend(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return Eq. 4 for this rank's tokens [B, n, H, D]; for all of them with one rank."""
    if group is None or group.size() == 1:
        return linear_attention(q, k, v, normalized=True)
    state = sum_over_ranks(linear_attention_state(k, v), group)
    return linear_attention_from_state(q, state, normalized=True)


def main() -> int:
    start = time.monotonic()
    parser = BenchmarkParser("context", __doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(DTYPE), default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two short lengths, one repetition")
    arguments = parser.parse_args()
    device = arguments.device
    parser.check_positive(arguments, "ranks", "tokens", "repetitions")
    if arguments.quick:
        arguments.tokens, arguments.repetitions = [512, 1024], 1
    ranks = sorted({1, *arguments.ranks})
    if device == "cuda" and torch.cuda.device_count() < ranks[-1]:
        found = torch.cuda.device_count()
        parser.error(f"ranks ({ranks[-1]}) must be at most the number of GPUs ({found})")
    output, facts = parser.begin(arguments, device, MEASURED)
    facts |= {
        "backend": "nccl" if device == "cuda" else "gloo",
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "repetitions": str(arguments.repetitions),
    }
    plan = list(product(range(arguments.repetitions), sorted(set(arguments.tokens)), ranks))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _one_rank,
            (facts["backend"], device, ranks, plan, Path(folder)),
            nprocs=ranks[-1],
            start_method="spawn",
        )
        found_by_rank = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    checks = [Check(**check) for checks, _ in found_by_rank for check in checks]
    rows = [row for _, rows in found_by_rank for row in rows]
    facts["duration"] = f"{time.monotonic() - start:.0f} s"
    report = ContextReport(facts, checks, rows)
    print(report.write(output))
    return 0 if report.passed else 1


def _one_rank(
    rank: int,
    backend: str,
    device: str,
    ranks: list[int],
    plan: list[tuple[int, int, int]],
    folder: Path,
) -> None:
    """Write this rank's checks and rows for every repetition, number of tokens and of ranks."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks[-1])
    groups = {size: dist.new_group(list(range(size))) for size in ranks}
    checks: list[Check] = []
    for size in ranks:
        if rank < size > 1:
            checks += _check(groups[size], device)
    rows = []
    for repetition, num_tokens, size in plan:
        dist.barrier()
        if rank < size:
            rows.append(_measure(num_tokens, repetition, groups[size], device))
    found = [asdict(check) for check in checks], rows
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _check(group: dist.ProcessGroup, device: str) -> list[Check]:
    """Check this rank's output and gradients against one rank."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, CHECK_TOKENS, HEADS, 4, HEAD_DIM
    packed = torch.randn(shape, generator=generator, device=device).to(DTYPE[device])
    own = token_slice(CHECK_TOKENS, group.rank(), group.size())
    exact, plain = (
        [x[:, own] for x in output_and_gradients(attend, whole)]
        for whole in (packed.double(), packed)
    )
    found = output_and_gradients(partial(attend, group=group), packed[:, own])
    return check_tensors(f"{group.size()} ranks", CHECK_TOKENS, found, plain, exact)


def _measure(num_tokens: int, repetition: int, group: dist.ProcessGroup, device: str) -> Row:
    """Measure one forward and backward, after a short one in which kernels are compiled."""
    own = token_slice(num_tokens, group.rank(), group.size())
    packed = _packed(own.stop - own.start, device)
    split_attend = partial(attend, group=group)
    output_and_gradients(split_attend, packed[:, :64])
    *inputs, grad = packed.unbind(3)
    inputs = [x.requires_grad_() for x in inputs]
    dist.barrier(group)
    peak = PeakMemory(device)
    cpu, wall = time.process_time(), time.perf_counter()
    with TrafficMeter({"context": group}) as forward:
        out = split_attend(*inputs)
    with TrafficMeter({"context": group}) as backward:
        torch.autograd.grad(out, inputs, grad)
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "num_tokens": num_tokens,
        "num_ranks": group.size(),
        "rank": group.rank(),
        "repetition": repetition,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "forward_bytes": sum(forward.bytes.values()),
        "backward_bytes": sum(backward.bytes.values()),
        "peak_mib": peak.growth() / 2**20,
    }


def _packed(num_tokens: int, device: str) -> Tensor:
    """Return q, k, v and the output gradient [1, n, H, 4, D]: random first tokens, repeated."""
    shape = 1, min(num_tokens, 4096), HEADS, 4, HEAD_DIM
    block = torch.randn(shape, device=device, dtype=DTYPE[device])
    return block.repeat(1, -(-num_tokens // shape[1]), 1, 1, 1)[:, :num_tokens]


if __name__ == "__main__":
    sys.exit(main())

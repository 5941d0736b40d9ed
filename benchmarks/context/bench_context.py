"""Cost and traffic of one attention layer when the tokens of an image are split over ranks.

``python -m benchmarks.context.bench_context [OUTPUT_FOLDER]`` starts a process per rank (nccl
between GPUs, gloo otherwise), checks that split attention computes what one rank computes, and
measures forward and backward over the number of tokens. It prints summary.md and writes it,
context.csv (one row per measurement and rank) and context.png into OUTPUT_FOLDER. Exit codes: 0
measured, 1 a result is wrong or a layer exchanges more or less than it should, 2 bad arguments.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import benchmark_facts, results_folder
from benchmarks.context.report import CHECK_TOKENS, HEAD_DIM, HEADS, ContextReport, ContextRow
from benchmarks.correctness import Check, check_tensors, output_and_gradients
from benchmarks.peak_memory import PeakMemory
from ds_linclip.parallel.context_parallel import sum_over_ranks, token_slice
from linclip_kernels import linear_attention, linear_attention_from_state, linear_attention_state

MEASURED = (
    "kernels/linclip_kernels",
    "benchmarks",
    "ds_linclip/parallel/context_parallel.py",
)
RANKS = (1, 2, 4)
TOKENS = (16_384, 32_768, 65_536, 131_072, 262_144)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The measurements that every rank makes."""

    device: str
    ranks: Sequence[int]
    tokens: Sequence[int]
    repetitions: int


class CollectiveBytes(TorchDispatchMode):
    """Dispatch mode that adds up the bytes of the tensors that go into collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = (x for x in tree_leaves(args) if isinstance(x, Tensor))
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def attend(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return Eq. 4 for this rank's tokens [B, n, H, D]; for all of them without a group."""
    if group is None:
        return linear_attention(q, k, v, normalized=True)
    state = sum_over_ranks(linear_attention_state(k, v), group)
    return linear_attention_from_state(q, state, normalized=True)


def main() -> int:
    start, load = time.monotonic(), os.getloadavg()[0]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="docs/results/context/<device>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two short lengths, one repetition")
    arguments = parser.parse_args()
    device = arguments.device
    if device not in DTYPE:
        parser.error(f"device ({device!r}) must be 'cpu' or 'cuda'")
    for name in ("ranks", "tokens"):
        if min(getattr(arguments, name)) < 1:
            parser.error(f"{name} ({min(getattr(arguments, name))}) must be positive")
    if arguments.repetitions < 1:
        parser.error(f"repetitions ({arguments.repetitions}) must be positive")
    ranks = sorted({1, *arguments.ranks})
    if device == "cuda" and torch.cuda.device_count() < ranks[-1]:
        found = torch.cuda.device_count()
        parser.error(f"ranks ({ranks[-1]}) must be at most the number of GPUs ({found})")
    plan = Plan(
        device=device,
        ranks=ranks,
        tokens=(512, 1024) if arguments.quick else sorted(set(arguments.tokens)),
        repetitions=1 if arguments.quick else arguments.repetitions,
    )
    output = arguments.output or results_folder("context", device)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"output ({output}) must be a folder: {error.strerror}")
    checks, rows = run(plan)
    facts = benchmark_facts(device, MEASURED) | {
        "cores": str(len(os.sched_getaffinity(0))),
        "backend": "nccl" if device == "cuda" else "gloo",
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "repetitions": str(plan.repetitions),
        "duration": f"{time.monotonic() - start:.0f} s",
        "load before": f"{load:.1f}",
    }
    report = ContextReport(facts, checks, rows)
    print(report.write(output))
    return 0 if report.passed else 1


def run(plan: Plan) -> tuple[list[Check], list[ContextRow]]:
    """Start the ranks; return their checks and measurements."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _one_rank, (plan, Path(folder)), nprocs=plan.ranks[-1], start_method="spawn"
        )
        found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    checks = [Check(**check) for one in found for check in one["checks"]]
    return checks, [ContextRow(**row) for one in found for row in one["rows"]]


def _one_rank(rank: int, plan: Plan, folder: Path) -> None:
    torch.set_num_threads(1)
    if plan.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if plan.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=plan.ranks[-1],
    )
    groups = {size: dist.new_group(list(range(size))) for size in plan.ranks}
    checks = [
        check
        for size, group in groups.items()
        if rank < size and size > 1
        for check in _check(group, plan.device)
    ]
    rows = []
    for repetition, num_tokens, size in product(range(plan.repetitions), plan.tokens, plan.ranks):
        dist.barrier()
        if rank < size:
            group = groups[size] if size > 1 else None
            measured = _measure(num_tokens, rank, size, group, plan.device)
            rows.append({"rank": rank, "repetition": repetition, **measured})
    found = {"checks": [asdict(check) for check in checks], "rows": rows}
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


def _measure(
    num_tokens: int, rank: int, size: int, group: dist.ProcessGroup | None, device: str
) -> dict[str, Any]:
    """Measure one forward and backward, after a short one in which kernels are compiled."""
    own = token_slice(num_tokens, rank, size)
    packed = _packed(own.stop - own.start, device)
    split_attend = partial(attend, group=group)
    output_and_gradients(split_attend, packed[:, :64])
    *inputs, grad = packed.unbind(3)
    inputs = [x.requires_grad_() for x in inputs]
    if group is not None:
        dist.barrier(group)
    peak = PeakMemory(device)
    cpu, wall = time.process_time(), time.perf_counter()
    with CollectiveBytes() as forward:
        out = split_attend(*inputs)
    with CollectiveBytes() as backward:
        torch.autograd.grad(out, inputs, grad)
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "num_tokens": num_tokens,
        "num_ranks": size,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "forward_bytes": forward.total,
        "backward_bytes": backward.total,
        "peak_mib": peak.growth() / 2**20,
    }


def _packed(num_tokens: int, device: str) -> Tensor:
    """Return q, k, v and the output gradient [1, n, H, 4, D]: random first tokens, repeated."""
    shape = 1, min(num_tokens, 4096), HEADS, 4, HEAD_DIM
    block = torch.randn(shape, device=device, dtype=DTYPE[device])
    return block.repeat(1, -(-num_tokens // shape[1]), 1, 1, 1)[:, :num_tokens]


if __name__ == "__main__":
    sys.exit(main())

"""What one attention layer costs and exchanges when the tokens of an image are split over ranks.

``python -m benchmarks.context.bench_context [OUTPUT_FOLDER]`` starts a process per rank (nccl
between GPUs, gloo otherwise), checks that split attention computes what one rank computes, and
measures forward and backward over the number of tokens. It prints summary.md and writes it,
context.csv (one row per measurement and rank) and context.png into OUTPUT_FOLDER. Exit codes: 0
measured, 1 a result is wrong or a layer exchanges more or less than it should, 2 bad arguments.
"""

import argparse
import ctypes
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.context.report import (
    CHECK_TOKENS,
    HEAD_DIM,
    HEADS,
    ContextReport,
    ContextRow,
    SplitCheck,
)
from ds_linclip.parallel.context_parallel import sum_over_ranks, token_slice
from ds_linclip.provenance import commit_of, device_name, folder_name
from linclip_kernels import linear_attention, linear_attention_from_state, linear_attention_state
from linclip_kernels.linear_attention.reference import ATOL, relative_rms

MEASURED = (
    "kernels/linclip_kernels",
    "benchmarks",
    "ds_linclip/parallel/context_parallel.py",
)
RANKS = (1, 2, 4)
TOKENS = (16_384, 32_768, 65_536, 131_072, 262_144)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every rank is to do."""

    device: str
    ranks: Sequence[int]
    tokens: Sequence[int]
    repetitions: int


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the tensors that go into collectives while this mode is on."""

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


def attend(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Eq. 4 for this rank's tokens [B, n, H, D]; all of them without a group."""
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
    name = device_name(device)
    output = arguments.output or Path("docs/results/context", folder_name(name))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"output ({output}) must be a folder: {error.strerror}")
    checks, rows = run(plan)
    facts = {
        "device": name,
        "cores": str(len(os.sched_getaffinity(0))),
        "backend": "nccl" if device == "cuda" else "gloo",
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "torch": torch.__version__,
        "repetitions": str(plan.repetitions),
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit_of(MEASURED),
        "command": shlex.join(["python", *sys.argv]),
        "duration": f"{time.monotonic() - start:.0f} s",
        "load before": f"{load:.1f}",
    }
    report = ContextReport(facts, checks, rows)
    report.write(output)
    print(report.summary())
    return 0 if report.passed else 1


def run(plan: Plan) -> tuple[list[SplitCheck], list[ContextRow]]:
    """Start the ranks, and collect what they have found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _one_rank, (plan, Path(folder)), nprocs=plan.ranks[-1], start_method="spawn"
        )
        found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    checks = [SplitCheck(**check) for one in found for check in one["checks"]]
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


def _check(group: dist.ProcessGroup, device: str) -> list[SplitCheck]:
    """This rank's output and gradients against one rank, in float64 and in the same dtype."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, CHECK_TOKENS, HEADS, 4, HEAD_DIM
    packed = torch.randn(shape, generator=generator, device=device).to(DTYPE[device])
    own = token_slice(CHECK_TOKENS, group.rank(), group.size())
    exact = _with_gradients(packed.double(), None)
    rough = _with_gradients(packed, None)
    found = _with_gradients(packed[:, own], group)
    checks = []
    for name, value, plain, truth in zip(("o", "dq", "dk", "dv"), found, rough, exact, strict=True):
        allowed = 2 * relative_rms(plain[:, own], truth[:, own]) + ATOL[DTYPE[device]]
        checks.append(SplitCheck(group.size(), name, relative_rms(value, truth[:, own]), allowed))
    return checks


def _with_gradients(packed: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Output, dq, dk, dv for q, k, v and the output gradient in [B, n, H, 4, D]."""
    *inputs, grad = packed.detach().unbind(3)
    inputs = [x.requires_grad_() for x in inputs]
    out = attend(*inputs, group)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _measure(
    num_tokens: int, rank: int, size: int, group: dist.ProcessGroup | None, device: str
) -> dict[str, Any]:
    """One forward and backward, after a short one in which kernels are compiled."""
    own = token_slice(num_tokens, rank, size)
    packed = _packed(own.stop - own.start, device)
    _with_gradients(packed[:, :64], group)
    *inputs, grad = packed.unbind(3)
    inputs = [x.requires_grad_() for x in inputs]
    if group is not None:
        dist.barrier(group)
    peak = _Peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    with CollectiveBytes() as forward:
        out = attend(*inputs, group)
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
        "peak_mib": peak.mib(),
    }


def _packed(num_tokens: int, device: str) -> Tensor:
    """q, k, v and the output gradient in [1, n, H, 4, D], random in its first tokens, repeated."""
    shape = 1, min(num_tokens, 4096), HEADS, 4, HEAD_DIM
    block = torch.randn(shape, device=device, dtype=DTYPE[device])
    return block.repeat(1, -(-num_tokens // shape[1]), 1, 1, 1)[:, :num_tokens]


class _Peak:
    """Peak memory of this process from here on, beyond what it holds now."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            # What the allocator keeps of freed memory goes back; the peak resident set begins anew.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._bytes()

    def mib(self) -> float:
        return (self._bytes() - self.before) / MIB

    def _bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())

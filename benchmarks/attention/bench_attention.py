"""Linear attention against torch SDPA, an unfused torch form and flash-linear-attention.

``python -m benchmarks.attention.bench_attention [OUTPUT_FOLDER]`` checks the operator against its
definition and then, if it passes, measures time and memory over the number of tokens. It prints
summary.md and writes it, results.csv (one row per point, skipped ones with their reason) and
figure.png into OUTPUT_FOLDER. Inputs are random packed views of [B, N, H, 3, D], as in the model.
Exit codes: 0 measured, 1 the operator is wrong or has failed, 2 bad arguments.
"""

import argparse
import importlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from tqdm import tqdm

from benchmarks.attention.report import WORKS, Check, Report, Row
from benchmarks.attention.timing import (
    FAILED,
    HEAD_DIM,
    TIMING,
    Bench,
    Implementation,
    batch_and_heads,
)
from ds_linclip.provenance import commit_of, device_name, folder_name
from linclip_kernels import linear_attention, linear_attention_reference
from linclip_kernels.linear_attention.reference import ATOL, attend, relative_rms
from linclip_kernels.linear_attention.variant import Variant

TOKENS = (77, 197, 577, 1025, 4096, 16_384, 65_536, 262_144, 2**20, 2**22)
NOT_INSTALLED = "not installed"
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}

FORMS: dict[str, dict[str, Any]] = {
    "linclip Eq. 7": {"causal": False, "normalized": False},
    "linclip Eq. 4": {"causal": False, "normalized": True},
    "linclip Eq. 7, causal": {"causal": True, "normalized": False},
    "linclip Eq. 4, quadratic": {
        "causal": False,
        "normalized": True,
        "feature_map": "quadratic",
    },
    "linclip Eq. 4, causal": {"causal": True, "normalized": True},
}
#: Lengths of the correctness check; measured lengths up to the limit come in addition.
CHECK_TOKENS = (15, 77, 197, 1025)
CHECK_LIMIT = {"cuda": 4096, "cpu": 1025}


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eq. 7 as one writes it down, left to autograd."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = 0.5 * (v.sum(-2, keepdim=True) + q @ (k.mT @ v))
    return out.transpose(1, 2)


def implementations(device: str) -> list[Implementation]:
    found = [
        Implementation(name, "linclip", partial(linear_attention, **form), form["causal"])
        for name, form in FORMS.items()
    ]
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    for causal, (name, backend) in product((False, True), backends.items()):
        label = f"SDPA {name}, causal" if causal else f"SDPA {name}"
        function = partial(sdpa, causal=causal)
        found.append(Implementation(label, "sdpa", function, causal, backend))
    found.append(Implementation("plain torch Eq. 7", "other", plain_linear_attention))
    if device == "cuda" and _version("fla") != NOT_INSTALLED:
        chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

        def fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Less work than ours: no q/k norm, and no 1 + in its scores."""
            return chunked(q, k, v, scale=0.5, normalize=False)[0]

        found.append(Implementation("fla chunk_linear_attn, causal", "other", fla, causal=True))
    return found


def check_forms(device: str, tokens: list[int]) -> list[Check]:
    """Errors of output and gradients of every measured form, and what the rule allows.

    The operator runs on inputs as they are timed; four of their heads are held to the definition.
    """
    dtype = DTYPE[device]
    lengths = sorted({*CHECK_TOKENS, *(n for n in tokens if n <= CHECK_LIMIT[device])})
    checks = []
    for num_tokens, (name, form) in product(lengths, FORMS.items()):
        batch, heads = batch_and_heads(device, num_tokens)
        packed = torch.randn(batch, num_tokens, heads, 4, HEAD_DIM, device=device, dtype=dtype)
        found = [_corners(x) for x in _with_gradients(linear_attention, packed, form)]
        packed = _corners(packed)
        exact = _with_gradients(linear_attention_reference, packed.double(), form)
        plain = _with_gradients(_definition, packed, form)
        for tensor, value, rough, truth in zip(
            ("o", "dq", "dk", "dv"), found, plain, exact, strict=True
        ):
            allowed = 2 * relative_rms(rough, truth) + ATOL[dtype]
            checks.append(Check(name, num_tokens, tensor, relative_rms(value, truth), allowed))
    return checks


def _definition(q: Tensor, k: Tensor, v: Tensor, **form: Any) -> Tensor:
    return attend(q, k, v, Variant(**form))


def _corners(x: Tensor) -> Tensor:
    """First and last head of first and last batch: [B, N, H, ...] -> [2, N, 2, ...]."""
    return x[[0, -1]][:, :, [0, -1]]


def _with_gradients(
    function: Callable[..., Tensor], packed: Tensor, form: dict[str, Any]
) -> list[Tensor]:
    """Output, dq, dk, dv for q, k, v and the output gradient in [B, N, H, 4, D]."""
    *inputs, grad = packed.unbind(3)
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves, **form)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def main() -> int:
    start = time.monotonic()
    parser = _Parser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("output", type=Path, nargs="?", help="docs/results/kernels/<device>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--budget-seconds", type=float, default=420)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--commit", help="what to record where the folder is no git checkout")
    arguments = parser.parse_args()
    device, tokens = arguments.device, sorted(set(arguments.tokens))
    if device not in DTYPE:
        parser.error(f"device ({device!r}) must be 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("device ('cuda') must be available: this machine has no CUDA device")
    if tokens[0] < 1:
        parser.error(f"tokens ({tokens[0]}) must be at least 1")
    if not arguments.budget_seconds > 0:
        parser.error(f"budget-seconds ({arguments.budget_seconds}) must be positive")
    if arguments.threads < 1:
        parser.error(f"threads ({arguments.threads}) must be at least 1")
    name = device_name(device)
    output = arguments.output or Path("docs/results/kernels", folder_name(name))
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        parser.error(f"output ({output}) must be a folder one can write to: {error.strerror}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    checks = check_forms(device, tokens)
    wrong = [check for check in checks if not check.passed]
    if wrong:
        print(f"error: {len(wrong)} of {len(checks)} checks failed: {wrong[0]}", file=sys.stderr)
        return 1
    deadline = start + arguments.budget_seconds
    bench = Bench(device, DTYPE[device], implementations(device), deadline)
    bench.warm_up(min(tokens[0], 1024))
    facts = {
        "device": name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash-linear-attention": _version("fla"),
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": arguments.commit or commit_of(["kernels"]),
        "command": shlex.join(["python", *sys.argv]),
        "copy bandwidth": f"{1e-9 * bench.copy_bandwidth:.4g} GB/s, read and written",
        "timing": TIMING[device].format(threads=arguments.threads),
    }
    rows: list[Row] = []
    plan = tqdm(list(product(tokens, WORKS)), desc="bench", unit="point")
    for num_tokens, work in plan:
        plan.set_postfix_str(f"{work}, N = {num_tokens}")
        rows += bench.measure(num_tokens, work)
        if work == WORKS[-1]:  # what has been measured stays, whatever comes
            duration = f"{time.monotonic() - start:.0f} s"
            report = Report(facts | {"duration": duration}, checks, rows)
            report.write(output)
    print(report.summary())
    failed = [row for row in rows if row.family == "linclip" and row.skipped.startswith(FAILED)]
    for row in failed:
        place = f"{row.implementation}, {row.work}, N = {row.num_tokens}"
        print(f"error: {place}: {row.skipped}", file=sys.stderr)
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _version(module: str) -> str:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return NOT_INSTALLED


if __name__ == "__main__":
    sys.exit(main())

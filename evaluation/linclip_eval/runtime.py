"""``linclip-eval runtime``: time and memory of softmax and linear attention over the tokens.

As in arXiv 2604.10064: one layer, one block and whole towers on a sequence of N tokens, in
inference and in training, over many runs after a warm-up; and the bare operator before them.
"""

import argparse
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from ds_linclip.config import ParallelConfig
from ds_linclip.exit_codes import ExitCode
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.runtime_measurement import Limits, measure
from linclip_eval.runtime_report import write_report
from linclip_eval.runtime_scaling import Point
from linclip_eval.runtime_subjects import SUBJECTS, Subject

__all__ = ["main"]

#: By device: what is measured where the command line does not say.
_WHAT = {"cpu": ["attention", "layer", "block", "vit-s-16"], "cuda": list(SUBJECTS)}
_TOKENS = {"cpu": [2**i for i in range(8, 17)], "cuda": [2**i for i in range(8, 23)]}
_NUM_HEADS = {"cpu": 1, "cuda": 12}
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    command = ["linclip-eval", "runtime", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        _run(_parser().parse_args(arguments), shlex.join(command))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.USER_ERROR
    return ExitCode.FINISHED


def _run(options: argparse.Namespace, command: str) -> None:
    begin = time.monotonic()
    _check(options)
    limits = Limits(
        runs=options.runs,
        warmup=options.warmup,
        max_seconds_per_point=options.max_seconds_per_point,
        max_seconds_per_call=options.max_seconds_per_call,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    mesh = Mesh.create(ParallelConfig(device=options.device))
    device = mesh.device.type
    if device == "cpu":
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    subjects = list(dict.fromkeys(options.what or _WHAT[device]))
    tokens = sorted(set(options.tokens or _TOKENS[device]))
    num_heads = options.heads or _NUM_HEADS[device]
    facts = _facts(mesh.device, command) | {
        "heads of `attention`": str(num_heads),
        "limits": f"{limits.runs} runs after {limits.warmup} to warm up, or "
        f"{limits.max_seconds_per_point:g} s of runs; {limits.max_seconds_per_call:g} s for a "
        f"call; {options.budget_seconds:g} s for everything",
    }
    points: list[Point] = []
    for place, what in enumerate(subjects):
        # An equal share of what is left of the time, so that every subject gets to long sequences.
        left = options.budget_seconds - (time.monotonic() - begin)
        deadline = time.monotonic() + left / (len(subjects) - place)
        subject = Subject(what, mesh, _DTYPES[device], num_heads=num_heads)
        points += measure(subject, tokens, limits, deadline=deadline)
        duration = f"{time.monotonic() - begin:.0f} s"
        # What has been measured stays, whatever comes.
        write_report(options.out, points, facts | {"duration": duration}, limits.runs)
        sys.stderr.write(f"{what}: done after {duration}\n")
    mesh.close()


def _check(options: argparse.Namespace) -> None:
    for name, values in (
        ("tokens", options.tokens or []),
        ("heads", [] if options.heads is None else [options.heads]),
        ("threads", [options.threads]),
    ):
        if values and min(values) < 1:
            raise ValueError(f"{name} ({min(values)}) must be at least 1")
    if not options.budget_seconds > 0:
        raise ValueError(f"budget-seconds ({options.budget_seconds:g}) must be positive")


def _facts(device: torch.device, command: str) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": name,
        "precision": str(_DTYPES[device.type]).removeprefix("torch."),
        "torch": version("torch"),
        "triton": version("triton"),
        "date (UTC)": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "command": f"`{command}`",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the checkout that this file is in."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # told in one line, without the usage


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="linclip-eval runtime",
        description="Measure how time and memory of softmax and linear attention grow with the "
        "number of tokens.",
        epilog="Exit codes: 0, measured; 2, something that you can mend, told in one line.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=tuple(SUBJECTS),
        help=f"default: all on a GPU; {', '.join(_WHAT['cpu'])} on a CPU",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="default: powers of two from 256 to 4194304 on a GPU, to 65536 on a CPU",
    )
    parser.add_argument(
        "--heads",
        type=int,
        metavar="H",
        help=f"of 64 features, in `attention`; default: {_NUM_HEADS['cuda']} on a GPU, "
        f"{_NUM_HEADS['cpu']} on a CPU",
    )
    parser.add_argument("--runs", type=int, default=Limits.runs, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=Limits.warmup, help="default: %(default)s")
    parser.add_argument(
        "--max-seconds-per-point",
        type=float,
        default=Limits.max_seconds_per_point,
        metavar="S",
        help="runs of one attention at one N end after so long; default: %(default)s",
    )
    parser.add_argument(
        "--max-seconds-per-call",
        type=float,
        default=Limits.max_seconds_per_call,
        metavar="S",
        help="leave out what is predicted to take longer; default: %(default)s",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=480.0,
        metavar="S",
        help="for everything, shared equally by --what; default: %(default)s",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch on a CPU; default: %(default)s"
    )
    return parser

"""Memory and time of the losses in tiles against open_clip's, which hold all logits at once.

``python launch/bench_loss.py [OUTPUT_FOLDER]`` measures each loss and its gradient, each form and
size in a process of its own. It prints summary.md and writes it, loss.csv (one row per measurement)
and loss.png into OUTPUT_FOLDER. Exit codes: 0 every requirement is met, 1 one is not, 2 it could
not be measured.
"""

import argparse
import csv
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ds_linclip.loss import clip_loss, siglip_loss

ROOT = Path(__file__).parents[1]
#: Form -> its name and colour.
FORMS = {"tiles": ("ds_linclip", "#2563a8"), "plain": ("open_clip", "#d97706")}
#: Loss -> scale and bias as at the end of training, where rounding matters most.
SCALARS = {"clip": (100.0,), "siglip": (100.0, -10.0)}
MAX_SHARE, MAX_VALUE_ERROR, MAX_GRADIENT_ERROR = 1 / 8, 1e-5, 1e-4
MIB = 2**20
NOTES = """\
- Every measurement is one forward and backward in a process of its own, after one of 64 pairs. Peak
  memory is what comes on top of the inputs, gradients included: on a CPU growth of the peak
  resident set (VmHWM, reset after the inputs were made), on a GPU of
  torch.cuda.max_memory_allocated.
- The other form is open_clip's ClipLoss or SigLipLoss with autograd, in one process, as published.
- Features are float32 and normalised; those of a pair have a cosine of about 0.15, others of 0.
  Logit scale 100, bias -10.
- Out of memory: the process needed more than the machine had available when it began.
- Differences are between the two forms: of the value, relative, and of the gradients of both
  features, relative RMS.
- Times are of one call and noisy: on a CPU other work ran on the cores (the load average before
  is in loss.csv). CPU time is of all threads of the process, GPU work not included."""
_INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures."""

    loss: str
    form: str
    num_pairs: int
    dim: int
    chunk_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; None where memory did not suffice, or there is nothing to compare."""

    case: Case
    peak_mib: float | None
    seconds: float | None
    cpu_seconds: float | None
    load: float
    value: float | None
    value_difference: float | None = None
    gradient_difference: float | None = None

    def record(self) -> dict[str, object]:
        values = asdict(self)
        values = {**values.pop("case"), **values}
        return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}


@dataclass(frozen=True)
class Requirement:
    """What was asked for, and what was found."""

    name: str
    rule: str
    found: str
    passed: bool


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="docs/results/loss/<device>")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--losses", nargs="+", choices=list(SCALARS), default=list(SCALARS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    for name, value in (("sizes", min(arguments.sizes)), ("dim", arguments.dim)):
        if value < 1:
            parser.error(f"{name} ({value}) must be positive")
    if arguments.chunk_size < 1:
        parser.error(f"chunk-size ({arguments.chunk_size}) must be positive")
    results = ROOT / "docs" / "results" / "loss"
    output = arguments.output or results / _slug(_device_name(arguments.device))
    rows: list[Row] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        # What needs most comes first, and what was found is kept if the run is ended early.
        for found in measure_all(arguments):
            rows = sorted([*rows, *found], key=lambda row: (row.case.loss, row.case.num_pairs))
            facts = _facts(arguments, rows) | {"duration": f"{time.monotonic() - start:.0f} s"}
            requirements = [one for loss in arguments.losses for one in judge(rows, loss)]
            write(output, facts, rows, requirements)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(facts, rows, requirements))
    return 0 if all(requirement.passed for requirement in requirements) else 1


def measure_all(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one loss and size, one per form, the largest sizes first."""
    plan = list(product(sorted(set(arguments.sizes), reverse=True), arguments.losses))
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(plan), unit="run") as bar:
        for num_pairs, loss in plan:
            cases = {
                form: Case(
                    loss=loss,
                    form=form,
                    num_pairs=num_pairs,
                    dim=arguments.dim,
                    chunk_size=arguments.chunk_size,
                    device=arguments.device,
                )
                for form in FORMS
            }
            found: dict[str, dict[str, Any]] = {}
            for form, case in cases.items():
                bar.set_description(f"{loss} {num_pairs} {form}")
                found[form] = measure_apart(case, Path(folder) / "found.pt")
                bar.update()
            differences = compare(found["tiles"], found["plain"])
            rows = []
            for form, case in cases.items():
                results = found[form].pop("results", None)
                value = results[0].item() if results else None
                rows.append(Row(case=case, value=value, **found[form], **differences))
            yield rows


def measure_apart(case: Case, file: Path) -> dict[str, Any]:
    """Measure in a new process; "results" are value and gradients.

    Raises:
        CalledProcessError: when it ends early.
    """
    load = os.getloadavg()[0]
    file.unlink(missing_ok=True)
    process = get_context("spawn").Process(target=measure, args=(case, file), daemon=True)
    process.start()
    process.join()
    if process.exitcode == 0 and file.exists():
        return torch.load(file) | {"load": load}
    # Killed for others' want of memory is no finding: its own shows as a failed allocation.
    raise subprocess.CalledProcessError(process.exitcode or 1, f"measurement of {case}")


def measure(case: Case, file: Path) -> None:
    """Write peak memory, time and results of one forward and backward into a file."""
    on_cpu = case.device == "cpu"
    if on_cpu:
        _stay_within_memory()
    inputs = make_inputs(case, case.num_pairs)
    run(case, make_inputs(case, 64))  # libraries, threads
    found: dict[str, Any] = {"peak_mib": None, "seconds": None, "cpu_seconds": None}
    before = _reset_peak(case.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        value = run(case, inputs)
    except RuntimeError as error:
        # torch has no class of its own for the CPU's.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    else:
        found["seconds"] = time.perf_counter() - start
        found["cpu_seconds"] = time.process_time() - cpu_start
        peak = _peak(case.device) - before
        results = [value.detach(), *(x.grad for x in inputs if x.grad is not None)]
        if peak < sum(x.nbytes for x in results):
            raise RuntimeError(f"sizes ({case.num_pairs}) must be larger for memory to show")
        found["peak_mib"] = peak / MIB
        found["results"] = [x.cpu() for x in results]
    torch.save(found, file)


def make_inputs(case: Case, num_pairs: int) -> list[Tensor]:
    """Normalised features, scale and, for siglip, bias: leaves that need a gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, num_pairs, case.dim, generator=generator)
    rows[1] += 0.15 * rows[0]  # the loss of such pairs is neither 0 nor that of chance
    features = [F.normalize(x, dim=-1).to(case.device) for x in rows]
    scalars = [torch.tensor(value, device=case.device) for value in SCALARS[case.loss]]
    return [x.requires_grad_() for x in (*features, *scalars)]


def run(case: Case, inputs: list[Tensor]) -> Tensor:
    """Loss and, in the inputs, its gradient."""
    if case.form == "plain":
        value = (ClipLoss() if case.loss == "clip" else SigLipLoss())(*inputs)
    elif case.loss == "clip":
        images, texts, scale = inputs
        value = clip_loss(images, texts, scale, chunk_size=case.chunk_size)
    else:
        images, texts, scale, bias = inputs
        value = siglip_loss(images, texts, scale, bias, chunk_size=case.chunk_size)
    value.backward()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return value


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Relative differences of value and feature gradients, if both were found."""
    if "results" not in ours or "results" not in theirs:
        return {}
    value, *gradients = ours["results"]
    expected, *expected_gradients = theirs["results"]
    pairs = zip(gradients[:2], expected_gradients[:2], strict=True)
    return {
        "value_difference": (abs(value - expected) / abs(expected)).item(),
        "gradient_difference": max(((a - b).norm() / b.norm()).item() for a, b in pairs),
    }


def judge(rows: Sequence[Row], loss: str) -> list[Requirement]:
    """Hold the largest size of which both forms were measured to the requirements."""
    ours, theirs = (
        {r.case.num_pairs: r for r in rows if (r.case.loss, r.case.form) == (loss, form)}
        for form in FORMS
    )
    sizes = [size for size, row in ours.items() if row.peak_mib and theirs[size].peak_mib]
    if not ours:
        return []
    if not sizes:
        return [Requirement(f"{loss}: peak memory", f"<= {MAX_SHARE:g}x", "out of memory", False)]
    size = max(sizes)
    row, place = ours[size], f"{loss}, {size} x {ours[size].case.dim}"
    share = (row.peak_mib or 0) / (theirs[size].peak_mib or 0)
    value, gradient = row.value_difference or 0.0, row.gradient_difference or 0.0
    found = f"{share:.4f}x = 1/{1 / share:.0f}"
    return [
        Requirement(
            f"{place}: peak memory over open_clip's",
            f"<= {MAX_SHARE:g}x",
            found,
            share <= MAX_SHARE,
        ),
        Requirement(
            f"{place}: difference of the values",
            f"<= {MAX_VALUE_ERROR:g}",
            f"{value:.1e}",
            value <= MAX_VALUE_ERROR,
        ),
        Requirement(
            f"{place}: difference of the gradients",
            f"<= {MAX_GRADIENT_ERROR:g}",
            f"{gradient:.1e}",
            gradient <= MAX_GRADIENT_ERROR,
        ),
    ]


def write(
    folder: Path, facts: dict[str, str], rows: Sequence[Row], requirements: Sequence[Requirement]
) -> None:
    """Write loss.csv, summary.md and loss.png."""
    common = {name: facts[name] for name in ("threads", "torch", "date_utc", "commit")}
    records = [row.record() | common for row in rows]
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    (folder / "summary.md").write_text(summary(facts, rows, requirements))
    draw(facts, rows).savefig(folder / "loss.png", dpi=150)


def summary(facts: dict[str, str], rows: Sequence[Row], requirements: Sequence[Requirement]) -> str:
    """All but the picture, in Markdown aligned so that it can be read as it is."""
    verdicts = [
        [one.name, one.rule, one.found, "pass" if one.passed else "FAIL"] for one in requirements
    ]
    lines = []
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        ratio = "-"
        if ours.peak_mib and theirs.peak_mib:
            ratio = f"1/{theirs.peak_mib / ours.peak_mib:.0f}"
        lines.append(
            [
                ours.case.loss,
                str(ours.case.num_pairs),
                *(_cell(row.peak_mib, ".0f") for row in (ours, theirs)),
                ratio,
                *(_cell(row.cpu_seconds, ".1f") for row in (ours, theirs)),
                *(_cell(row.seconds, ".1f") for row in (ours, theirs)),
                _cell(ours.value_difference, ".1e", "-"),
                _cell(ours.gradient_difference, ".1e", "-"),
            ]
        )
    names = [name for name, _ in FORMS.values()]
    header = ["loss", "B", *(f"{name}, MiB" for name in names), "ratio"]
    header += [f"{name}, {what}" for what in ("CPU s", "s") for name in names]
    header += ["value differs", "gradients differ"]
    sections = [
        f"# Contrastive losses on {facts['device']}",
        _table(["", ""], [[*fact] for fact in facts.items()], left=2),
        "## Requirements",
        _table(["", "required", "found", ""], verdicts, left=4),
        "## Peak memory and time of a loss and its gradient",
        _table(header, lines),
        "## How it was measured",
        NOTES,
    ]
    return "\n\n".join(sections) + "\n"


def draw(facts: dict[str, str], rows: Sequence[Row]) -> Figure:
    """Memory over batch size, a panel per loss."""
    losses = list(dict.fromkeys(row.case.loss for row in rows))
    figure = Figure(figsize=(5.6 * len(losses), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for axes, loss in zip(panels, losses, strict=True):
        title = {"clip": "CLIP", "siglip": "SigLIP"}[loss]
        axes.set_title(title, loc="left", fontsize=11, color=_INK, weight="bold")
        _draw_loss(axes, [row for row in rows if row.case.loss == loss])
    panels[0].set_ylabel("peak memory of loss and gradient, MiB", fontsize=9, color=_MUTED)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=_INK)
    figure.suptitle(
        f"Contrastive losses, {facts['features']}\n{facts['device']}, torch {facts['torch']}, "
        f"{facts['date_utc']} UTC, {facts['commit']}",
        x=0.01,
        ha="left",
        fontsize=9,
        color=_MUTED,
    )
    return figure


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    for form, (name, colour) in FORMS.items():
        found = [(r.case.num_pairs, r.peak_mib) for r in rows if r.case.form == form and r.peak_mib]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5}
        axes.plot(*zip(*found, strict=True) if found else ([], []), label=name, **style)
        for size, peak in found:
            axes.annotate(
                f"{peak:.0f}",
                (size, peak),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=_INK,
            )
    sizes = sorted({row.case.num_pairs for row in rows})
    for row in rows:
        if row.peak_mib is not None:
            continue
        axes.annotate(
            f"{FORMS[row.case.form][0]}:\nout of memory",
            (row.case.num_pairs, 0.97),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=8.5,
            color=FORMS[row.case.form][1],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    axes.margins(y=0.12)
    axes.set_xlabel("pairs in the batch", fontsize=9, color=_MUTED)
    axes.tick_params(labelsize=8.5, labelcolor=_MUTED, length=0)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _stay_within_memory() -> None:
    """An allocation beyond the memory that is available now fails, in this process alone."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    now = _kib("/proc/self/status", "VmData") + _kib("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (now * 1024, now * 1024))


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    """Bytes, since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would be that of the process that started this one, where that is larger.
    return _kib("/proc/self/status", "VmHWM") * 1024


def _kib(file: str, name: str) -> int:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == f"{name}:")


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return _kib("/proc/meminfo", "MemTotal") * 1024


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _facts(arguments: argparse.Namespace, rows: Sequence[Row]) -> dict[str, str]:
    return {
        "device": _device_name(arguments.device),
        "memory": f"{_memory(arguments.device) / 2**30:.1f} GiB",
        "threads": str(torch.get_num_threads()),
        "torch": version("torch"),
        "open_clip_torch": version("open_clip_torch"),
        "features": f"float32, E = {arguments.dim}",
        "chunk_size": str(arguments.chunk_size),
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "load": f"{max(row.load for row in rows):.1f} at most, on {_num_cores()} cores",
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.machine()}"


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """The commit of the checkout, marked where the losses or this benchmark differ."""
    measured = ["ds_linclip/loss.py", str(Path(__file__).resolve())]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", *measured) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cell(value: float | None, form: str, none: str = "out of memory") -> str:
    return none if value is None else format(value, form)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; this many columns are aligned to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    aligned = [
        [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (header, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:]))


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of CLIP's loss and its gradients, in tiles and in one piece: ``make bench-loss``.

Each form runs in a process of its own, on the same fp32 features; the plain one is open_clip's, two
whole matrices of logits under autograd. Both must agree. Writes ``loss.csv``, ``loss.png`` and
``summary.md`` into ``docs/results/loss/<device>``; exit code 1 when the tiles need more than an
eighth of the plain form's memory at 32768 pairs.
"""

import argparse
import csv
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from ds_linclip.loss.contrastive import clip_loss
from ds_linclip.provenance import device_name, folder_name

DIM = 768
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "loss"


@dataclass(frozen=True)
class Row:
    """One number of pairs: peak memory above the inputs in MiB, seconds, agreement."""

    pairs: int
    tiles_mib: float
    plain_mib: float
    ratio: float
    tiles_seconds: float
    plain_seconds: float
    value_difference: float
    gradient_difference: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="default: docs/results/loss/<device>")
    arguments = parser.parse_args()
    rows = []
    for pairs in sorted(arguments.sizes):
        rows.append(measure_both(pairs, arguments.device))
        print(rows[-1], flush=True)
    folder = arguments.out or RESULTS / folder_name(device_name(arguments.device))
    write(folder, rows, arguments.device)
    missed = [row for row in rows if row.pairs >= 32768 and row.ratio < 8]
    return 1 if missed else 0


def measure_both(pairs: int, device: str) -> Row:
    """Each form in a fresh process; what they found is compared here.

    Raises:
        RuntimeError: when a process ends early, for want of memory for example.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        facts, gradients = {}, {}
        for form in ("tiles", "plain"):
            file = Path(folder) / form
            process = context.Process(target=measure, args=(form, pairs, device, file))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(
                    f"{form} at {pairs} pairs ended with {process.exitcode}: out of memory?"
                )
            facts[form] = json.loads(file.with_suffix(".json").read_text())
            gradients[form] = torch.load(file.with_suffix(".pt"), mmap=True)
        tiles, plain = facts["tiles"], facts["plain"]
        return Row(
            pairs=pairs,
            tiles_mib=tiles["mib"],
            plain_mib=plain["mib"],
            ratio=plain["mib"] / tiles["mib"],
            tiles_seconds=tiles["seconds"],
            plain_seconds=plain["seconds"],
            value_difference=abs(tiles["value"] / plain["value"] - 1),
            gradient_difference=max(
                ((ours - theirs).norm() / theirs.norm()).item()
                for ours, theirs in zip(gradients["tiles"], gradients["plain"], strict=True)
            ),
        )


def measure(form: str, pairs: int, device: str, file: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(pairs, DIM, generator=generator), dim=-1).to(device)
        for _ in range(2)
    )
    texts = F.normalize(images + 4 * texts, dim=-1)
    inputs = [images.requires_grad_(), texts.requires_grad_()]
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    before = _restart_peak(device)
    begun = time.perf_counter()
    loss = clip_loss(*inputs, scale) if form == "tiles" else ClipLoss()(*inputs, scale)
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - begun
    facts = {"mib": (_peak(device) - before) / 2**20, "seconds": seconds, "value": value}
    file.with_suffix(".json").write_text(json.dumps(facts))
    torch.save([x.grad.cpu() for x in (*inputs, scale) if x.grad is not None], f"{file}.pt")


def _restart_peak(device: str) -> int:
    """Bytes in use now, from which the peak is counted anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but held would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def write(folder: Path, rows: Sequence[Row], device: str) -> None:
    """``loss.csv``, ``summary.md`` and ``loss.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(asdict(row).values() for row in rows)
    name = device_name(device)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    lines = [
        "# Memory of the contrastive loss",
        "",
        f"`python -m benchmarks.bench_loss --device {device}` on {name}, {date},",
        f"torch {version('torch')}, open_clip_torch {version('open_clip_torch')}:",
        f"CLIP's loss of fp32 features [pairs, {DIM}] and its gradients, peak above the inputs; in",
        "tiles (`ds_linclip.loss.contrastive`) and in one piece (`open_clip.loss.ClipLoss`).",
        "",
        "| pairs | tiles, MiB | whole, MiB | ratio | tiles, s | whole, s | value | gradient |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row.pairs} | {row.tiles_mib:.0f} | {row.plain_mib:.0f} | {row.ratio:.1f} "
            f"| {row.tiles_seconds:.1f} | {row.plain_seconds:.1f} | {row.value_difference:.1e} "
            f"| {row.gradient_difference:.1e} |"
            for row in rows
        ),
        "",
        "The last two columns are relative differences between the forms.",
    ]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    pairs = [row.pairs for row in rows]
    axes.loglog(pairs, [row.plain_mib for row in rows], "o-", label="one piece (open_clip)")
    axes.loglog(pairs, [row.tiles_mib for row in rows], "o-", label="tiles (ds_linclip)")
    axes.set_xlabel("pairs in the batch")
    axes.set_ylabel("peak memory of loss and gradients, MiB")
    axes.set_xticks(pairs, [f"{size:,}" for size in pairs])
    axes.legend()
    axes.grid(which="both", alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

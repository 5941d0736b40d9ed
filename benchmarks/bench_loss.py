"""Peak memory of CLIP's loss and its gradients, in tiles and in one piece: ``make bench-loss``.

Each form runs in a process of its own, on the same fp32 features; the plain one is open_clip's, two
whole matrices of logits under autograd. Both must agree. Writes ``loss.csv``, ``loss.png`` and
``summary.md`` into ``docs/results/loss/<device>``; exit code 1 when the tiles need more than an
eighth of the plain form's memory at 32768 pairs.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from benchmarks import benchmark_facts, results_folder
from benchmarks.peak_memory import PeakMemory
from ds_linclip.loss.contrastive import clip_loss
from linclip_eval.plotting import LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report

MEASURED = ("ds_linclip/loss", "benchmarks/bench_loss.py")
DIM = 768


@dataclass(frozen=True)
class LossRow:
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
    device = arguments.device
    print(write(arguments.out or results_folder("loss", device), rows, device))
    missed = [row for row in rows if row.pairs >= 32768 and row.ratio < 8]
    return 1 if missed else 0


def measure_both(pairs: int, device: str) -> LossRow:
    """Measure each form in a fresh process and compare their results.

    Raises:
        RuntimeError: when a process fails, for example for lack of memory.
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
        return LossRow(
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
    peak, start = PeakMemory(device), time.perf_counter()
    loss = clip_loss(images, texts, scale) if form == "tiles" else ClipLoss()(images, texts, scale)
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - start
    facts = {"mib": peak.growth() / 2**20, "seconds": seconds, "value": value}
    file.with_suffix(".json").write_text(json.dumps(facts))
    torch.save([x.grad.cpu() for x in (*inputs, scale) if x.grad is not None], f"{file}.pt")


def write(folder: Path, rows: Sequence[LossRow], device: str) -> str:
    """Write loss.csv, loss.png and summary.md, whose text is returned."""
    cells = [
        [
            *(row.pairs, f"{row.tiles_mib:.0f}", f"{row.plain_mib:.0f}", f"{row.ratio:.1f}"),
            *(f"{row.tiles_seconds:.1f}", f"{row.plain_seconds:.1f}"),
            *(f"{row.value_difference:.1e}", f"{row.gradient_difference:.1e}"),
        ]
        for row in rows
    ]
    header = ["pairs", "tiles, MiB", "whole, MiB", "ratio", "tiles, s", "whole, s"]
    return write_report(
        folder,
        title="Memory of the contrastive loss",
        sections=[
            f"CLIP's loss of fp32 features [pairs, {DIM}] and its gradients, peak above the "
            "inputs; in tiles (`ds_linclip.loss.contrastive`) and in one piece "
            "(`open_clip.loss.ClipLoss`).",
            markdown_table([*header, "value", "gradient"], cells, align="r" * 8),
            "The last two columns are relative differences between the forms.",
            "![Peak memory over the pairs in the batch](loss.png)",
        ],
        facts=benchmark_facts(device, MEASURED, ("torch", "open_clip_torch")),
        tables={"loss.csv": rows},
        figures={"loss.png": _draw(rows)},
    )


def _draw(rows: Sequence[LossRow]) -> Figure:
    figure = new_figure(5, 4)
    axes = figure.subplots()
    pairs = [row.pairs for row in rows]
    plain, tiles = [row.plain_mib for row in rows], [row.tiles_mib for row in rows]
    axes.loglog(pairs, plain, "o-", color=SOFTMAX, label="one piece (open_clip)")
    axes.loglog(pairs, tiles, "o-", color=LINEAR, label="tiles (ds_linclip)")
    dress(
        axes, "loss and gradients", xlabel="pairs in the batch", ylabel="peak above the inputs, MiB"
    )
    axes.set_xticks(pairs, [f"{size:,}" for size in pairs])
    axes.minorticks_off()
    add_legend(axes)
    return figure


if __name__ == "__main__":
    sys.exit(main())

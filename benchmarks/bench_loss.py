"""Peak memory of CLIP's loss and its gradients, in tiles and in one piece: ``make bench-loss``.

Each form runs in a process of its own, on the same fp32 features; the plain one is open_clip's, two
whole matrices of logits under autograd. Both must agree. Writes ``loss.csv``, ``loss.png`` and
``summary.md`` into ``docs/results/loss/<device>``; exit code 1 when the tiles need more than an
eighth of the plain form's memory at 32768 pairs.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from matplotlib.figure import Figure
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from benchmarks import BenchmarkParser
from benchmarks.peak_memory import PeakMemory
from ds_linclip.loss.contrastive import clip_loss
from linclip_eval.plotting import LINEAR, SOFTMAX, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report
from linclip_kernels.linear_attention.reference import relative_rms

MEASURED = ("ds_linclip/loss", "benchmarks/bench_loss.py")
DIM = 768


#: Columns of loss.csv and their formats: peak memory above the inputs in MiB, seconds, agreement.
COLUMNS = {
    "pairs": "d",
    "tiles_mib": ".0f",
    "plain_mib": ".0f",
    "ratio": ".1f",
    "tiles_seconds": ".1f",
    "plain_seconds": ".1f",
    "value_difference": ".1e",
    "gradient_difference": ".1e",
}


def main() -> int:
    parser = BenchmarkParser("loss", __doc__, "--out")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    output, facts = parser.begin(arguments, device, MEASURED, ("torch", "open_clip_torch"))
    rows = []
    for pairs in sorted(arguments.sizes):
        rows.append(measure_both(pairs, device))
        print(rows[-1], flush=True)
    table = [[f"{row[name]:{form}}" for name, form in COLUMNS.items()] for row in rows]
    header = ["pairs", "tiles, MiB", "whole, MiB", "ratio", "tiles, s", "whole, s"]
    summary = write_report(
        output,
        title="Memory of the contrastive loss",
        sections=[
            f"CLIP's loss of fp32 features [pairs, {DIM}] and its gradients, peak above the "
            "inputs; in tiles (`ds_linclip.loss.contrastive`) and in one piece "
            "(`open_clip.loss.ClipLoss`).",
            markdown_table([*header, "value", "gradient"], table, align="r" * 8),
            "The last two columns are relative differences between the forms.",
            "![Peak memory over the pairs in the batch](loss.png)",
        ],
        facts=facts,
        tables={"loss.csv": rows},
        figures={"loss.png": _draw(rows)},
    )
    print(summary)
    return 1 if any(row["pairs"] >= 32768 and row["ratio"] < 8 for row in rows) else 0


def measure_both(pairs: int, device: str) -> dict[str, float]:
    """Measure each form in a fresh process and compare their results.

    Raises:
        BrokenProcessPool: when a process is killed, for example for lack of memory.
    """
    found = []
    for form in ("tiles", "plain"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(measure, form, pairs, device).result())
    (tiles_mib, tiles_seconds, tiles), (plain_mib, plain_seconds, plain) = found
    value, *gradients = (
        relative_rms(torch.from_numpy(ours), torch.from_numpy(theirs))
        for ours, theirs in zip(tiles, plain, strict=True)
    )
    memory = tiles_mib, plain_mib, plain_mib / tiles_mib
    values = pairs, *memory, tiles_seconds, plain_seconds, value, max(gradients)
    return dict(zip(COLUMNS, values, strict=True))


def measure(form: str, pairs: int, device: str) -> tuple[float, float, list[np.ndarray]]:
    """Return the peak in MiB, seconds, and loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(pairs, DIM, generator=generator), dim=-1).to(device)
        for _ in range(2)
    )
    texts = F.normalize(images + 4 * texts, dim=-1)
    scale = torch.tensor(20.0, device=device)
    inputs = [x.requires_grad_() for x in (images, texts, scale)]
    function = clip_loss if form == "tiles" else ClipLoss()
    peak, start = PeakMemory(device), time.perf_counter()
    loss = function(images, texts, scale)
    loss.backward()
    value = loss.detach().cpu()
    seconds = time.perf_counter() - start
    mib = peak.growth() / 2**20
    gradients = [x.grad.cpu() for x in inputs if x.grad is not None]
    return mib, seconds, [x.numpy() for x in (value, *gradients)]


def _draw(rows: Sequence[dict[str, float]]) -> Figure:
    figure = new_figure(5, 4)
    axes = figure.subplots()
    pairs = [row["pairs"] for row in rows]
    for form, colour, label in (
        ("plain", SOFTMAX, "one piece (open_clip)"),
        ("tiles", LINEAR, "tiles (ds_linclip)"),
    ):
        memory = [row[f"{form}_mib"] for row in rows]
        axes.loglog(pairs, memory, "o-", color=colour, label=label)
    dress(
        axes, "loss and gradients", xlabel="pairs in the batch", ylabel="peak above the inputs, MiB"
    )
    axes.set_xticks(pairs, [f"{size:,}" for size in pairs])
    axes.minorticks_off()
    add_legend(axes)
    return figure


if __name__ == "__main__":
    sys.exit(main())

"""The same training in fp32, amp_bf16 and bf16: losses and logit scales in one picture.

``python -m experiments.precision [OUTPUT_FOLDER]`` trains on the embedded dataset, two runs at a
time, one core each, and writes summary.md, steps.csv and figure.png into OUTPUT_FOLDER
(docs/results/precision). A few minutes.
"""

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from ds_linclip.config import load_config
from ds_linclip.provenance import run_facts
from experiments.convergence import train_all
from linclip_eval.plotting import COLOURS, INK, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, write_report

CONFIG = "ds_configs/train/embedded.yaml"
PRECISIONS = ("fp32", "amp_bf16", "bf16")
#: Loss and logit scale of every step.
Curve = list[tuple[float, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/results/precision"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--more",
        nargs="+",
        default=[],
        metavar="NAME=METRICS",
        help="metrics.jsonl of further runs with the same settings, of older code for example",
    )
    arguments = parser.parse_args()
    configs = {
        precision: load_config(
            CONFIG,
            [
                *("output_dir=runs/precision", f"name={precision}"),
                *(f"train.steps={arguments.steps}", f"train.precision={precision}"),
                *("log.every_steps=1", "log.tensorboard=false", "log.num_images=0"),
                *("data.num_workers=0", "eval.every_steps=0", "checkpoint.every_steps=0"),
            ],
        )
        for precision in PRECISIONS
    }
    for run in train_all(list(configs.items()), processes=2):
        print(f"{run.variant}: zero-shot top-1 {run.top1:.3f}")
    files = {name: config.run_dir / "metrics.jsonl" for name, config in configs.items()}
    more = (each.partition("=") for each in arguments.more)
    files |= {name: Path(file) for name, _, file in more}
    print(write(arguments.output, {name: read_curve(file) for name, file in files.items()}))
    return 0


def read_curve(metrics: Path) -> Curve:
    """Read a run's loss and logit scale of every step."""
    records = map(json.loads, metrics.read_text().splitlines())
    return [(r["train/loss"], r["train/logit_scale"]) for r in records if "train/loss" in r]


def write(folder: Path, curves: dict[str, Curve]) -> str:
    """Write the comparison of runs of equal length with the first of them; return the summary."""
    reference = next(iter(curves.values()))
    tail = max(1, len(reference) // 10)
    rows = []
    for name, curve in curves.items():
        pairs = zip(curve, reference, strict=True)
        apart = statistics.fmean(abs(loss / expected - 1) for (loss, _), (expected, _) in pairs)
        end = statistics.fmean(loss for loss, _ in curve[-tail:])
        scales = [scale for _, scale in curve]
        jump = max(abs(b / a - 1) for a, b in pairwise(scales))
        rows.append(
            [
                *(name, f"{end:.4f}", f"{apart:.1e}", f"{scales[0]:.4f}", f"{scales[-1]:.4f}"),
                *(f"{100 * jump:.2f}", longest_rest(scales)),
            ]
        )
    header = ["precision", f"loss, last {tail} steps", "apart", "first scale", "last scale"]
    steps = [
        {"precision": name, "step": step, "loss": loss, "logit_scale": scale}
        for name, curve in curves.items()
        for step, (loss, scale) in enumerate(curve, start=1)
    ]
    sections = [
        f"{len(reference)} steps of the embedded config from the same weights on the same batches. "
        "Apart: mean relative difference of a step's loss from the first row's. Scale: the logit "
        "scale as the loss sees it; its largest change from one step to the next, and the most "
        "steps in a row without any.",
        markdown_table([*header, "largest change, %", "steps at rest"], rows),
        "![Losses and logit scales](figure.png)",
    ]
    measured = ("ds_linclip", "experiments")
    facts = run_facts(
        *("cpu", f"python -m experiments.precision {folder}"),
        measured=measured,
        packages=("torch", "deepspeed"),
    )
    return write_report(
        folder,
        title="Precisions of training",
        sections=sections,
        facts=facts,
        tables={"steps.csv": steps},
        figures={"figure.png": draw(curves)},
    )


def longest_rest(scales: list[float]) -> int:
    """Return the most steps in a row that left the scale as it was."""
    longest = now = 0
    for before, after in pairwise(scales):
        now = now + 1 if before == after else 0
        longest = max(longest, now)
    return longest


def draw(curves: dict[str, Curve]) -> Figure:
    """Return a figure of the losses, and of the logit scales as the loss sees them."""
    figure = new_figure(11, 4.2)
    panels = figure.subplots(1, 2)
    for colour, (name, curve) in zip((INK, *COLOURS), curves.items(), strict=False):
        steps = range(1, len(curve) + 1)
        for axes, values in zip(panels, zip(*curve, strict=True), strict=True):
            axes.plot(steps, values, color=colour, linewidth=1.2, label=name)
    dress(panels[0], "Training loss", xlabel="step")
    dress(panels[1], "Logit scale as the loss sees it", xlabel="step")
    add_legend(panels[1])
    return figure


if __name__ == "__main__":
    sys.exit(main())

"""Score the same weights at several image sizes, on several sets of images.

Learned positions are resampled to the grid of each size, bicubic, as in open_clip.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer

from ds_linclip.inference import LoadedModel, load_model
from linclip_eval.commands import inputs, outputs
from linclip_eval.plotting import COLOURS, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, percent, wilson_interval

__all__ = ["run"]

_TIMED_SECONDS = 1.0
_TIMED_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The accuracy and cost of one model at one image size on one set of images."""

    model: str
    size: int
    domain: str
    num_samples: int
    top1: float
    top5: float
    #: Median time of the image tower per image, without reading it.
    seconds_per_image: float


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    models = inputs.parse_sources(options.models, "models")
    domains = inputs.parse_sources(options.data, "--data")
    inputs.check_out(options.out)
    scores = []
    remarks: dict[str, list[str]] = {}
    with inputs.all_ranks() as mesh:
        for label, source in models.items():
            for size in sorted(set(options.sizes)):
                model = load_model(source, mesh, precision=options.precision, image_size=size)
                seconds = _seconds_per_image(model)
                for domain, folder in domains.items():
                    task, result = inputs.score_task(options, folder, model, mesh, options.out)
                    remarks[domain] = outputs.zero_shot_remarks(task, result)
                    scores.append(
                        _Score(
                            model=label,
                            size=size,
                            domain=domain,
                            num_samples=result.num_samples,
                            top1=result.topk(1),
                            top5=result.topk(5),
                            seconds_per_image=seconds,
                        )
                    )
    if mesh.rank > 0:
        return
    num_samples = {score.domain: score.num_samples for score in scores}
    counts = ", ".join(f"{count} of {domain}" for domain, count in num_samples.items())
    outputs.publish(
        options.out,
        options.words,
        mesh.device,
        title="Zero-shot accuracy and cost over image sizes",
        sections=[
            "The same weights, with learned positions resampled to each size. Accuracies with "
            f"95 % intervals (Wilson) over the images: {counts}. The time is that of the image "
            f"tower alone, the median over batches of {_TIMED_BATCH} images.",
            outputs.bullets(f"{domain}: {line}" for domain in remarks for line in remarks[domain]),
            _table(scores, list(num_samples)),
            "![Accuracy and cost over image sizes](figure.png)",
        ],
        tables={"resolution.csv": scores},
        figures={"figure.png": _draw(scores, list(num_samples))},
        numbers={"scores": [asdict(score) for score in scores], "findings": remarks},
    )


def _seconds_per_image(model: LoadedModel) -> float:
    """Return the median time of the image tower over batches of noise, per image."""
    size = (_TIMED_BATCH, 3, *model.image_size)
    images = torch.randn(size, device=model.device, dtype=model.dtype)
    timer = Timer(
        "encode(images)",
        globals={"encode": model.encode_image, "images": images},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=_TIMED_SECONDS).median / _TIMED_BATCH


def _table(scores: Sequence[_Score], domains: Sequence[str]) -> str:
    lines: dict[tuple[str, int], list[_Score]] = {}
    for score in scores:
        lines.setdefault((score.model, score.size), []).append(score)
    rows = [
        (
            *place,
            f"{1000 * line[0].seconds_per_image:.2f}",
            *(percent(score.top1, score.num_samples) for score in line),
        )
        for place, line in lines.items()
    ]
    header = ("model", "px", "ms per image", *(f"{domain}: top-1, %" for domain in domains))
    return markdown_table(header, rows)


def _draw(scores: Sequence[_Score], domains: Sequence[str]) -> Figure:
    num_rows = math.ceil((len(domains) + 1) / 2)
    figure = new_figure(9, 3.4 * num_rows)
    *panels, cost = (figure.add_subplot(num_rows, 2, i + 1) for i in range(len(domains) + 1))
    models = dict.fromkeys(score.model for score in scores)
    for model, colour in zip(models, cycle(COLOURS), strict=False):
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": model}
        for axes, domain in zip(panels, domains, strict=True):
            line = [score for score in scores if (score.model, score.domain) == (model, domain)]
            sizes = [score.size for score in line]
            top1 = [100 * score.top1 for score in line]
            bars = np.transpose([_error_bar(score) for score in line])
            axes.errorbar(sizes, top1, yerr=bars, capsize=2, **style)
        cost.plot(sizes, [1000 * score.seconds_per_image for score in line], **style)
    cost.set_yscale("log")
    for axes in (*panels, cost):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    for axes, domain in zip(panels, domains, strict=True):
        dress(axes, domain, xlabel="image side, px", ylabel="zero-shot top-1, %")
    dress(cost, "Cost", xlabel="image side, px", ylabel="ms per image")
    add_legend(cost)
    return figure


def _error_bar(score: _Score) -> tuple[float, float]:
    """Return how far the interval reaches below and above the accuracy, in per cent."""
    low, high = wilson_interval(score.top1, score.num_samples)
    return 100 * max(score.top1 - low, 0), 100 * max(high - score.top1, 0)

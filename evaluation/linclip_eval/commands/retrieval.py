"""``linclip-eval retrieval``: find the captions of images, and the images of captions.

An image may have several captions, one per line of its text. Over several processes:
``deepspeed --module linclip_launch.eval retrieval ...``.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ds_linclip.data import LabelledData
from ds_linclip.inference import EvalModel
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.commands.arguments import (
    add_model_arguments,
    add_reading_arguments,
    model_from_arguments,
)
from linclip_eval.features import Features
from linclip_eval.plotting import COLOURS, MUTED, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, percent, write_results
from linclip_eval.retrieval import DIRECTIONS, RECALLS, RetrievalResult, retrieval

__all__ = ["main"]

_COLOURS = dict(zip(DIRECTIONS, COLOURS, strict=False))


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for bad input, on all ranks.
        OSError: for a file that cannot be read or written.
    """
    options = _parser().parse_args(arguments)
    mesh = Mesh.create()
    model = model_from_arguments(options, mesh)
    data = mesh.agree(
        lambda: LabelledData(
            options.data,
            transform=model.transform,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            needs_classes=False,
            strict=not options.lenient,
        ),
        (ValueError, OSError),
    )
    result = retrieval(
        model.encode_image,
        model.encode_text,
        data,
        tokenizer=model.tokenizer,
        device=model.device,
        group=mesh.dp.group,
        strict=not options.lenient,
    )
    if mesh.rank == 0:
        findings = data.findings.describe() if options.lenient else []
        _write(options.out, result, findings, model, arguments)
    mesh.barrier()
    mesh.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linclip-eval retrieval", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="folder of images with texts")
    add_reading_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _write(
    out: Path,
    result: RetrievalResult,
    findings: Sequence[str],
    model: EvalModel,
    arguments: Sequence[str],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _write_ranks_csv(result, out / "ranks.csv")
    _draw(result).savefig(out / "recall.png")
    features = result.features
    numbers = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "image_size": list(model.image_size),
        "num_images": result.num_images,
        "num_captions": result.num_captions,
        "num_repeated_captions": _num_repeated(features),
        "num_nonfinite": features.num_nonfinite,
        "unreadable": [{"key": key, "reason": reason} for key, reason in features.unreadable],
        "uncaptioned": list(features.uncaptioned),
        "findings": list(findings),
        **result.metrics(),
    }
    write_results(
        out,
        command=("retrieval", *arguments),
        title=f"Retrieval of images and captions: {model.title}",
        body=_summary(result, findings, model),
        numbers=numbers,
        device=model.device,
    )
    print((out / "summary.md").read_text(encoding="utf-8"))


def _summary(result: RetrievalResult, findings: Sequence[str], model: EvalModel) -> str:
    metrics = result.metrics()
    # The captions of one image are not independent of each other: images are the trials.
    captioned = len(np.unique(result.features.owners))
    trials = {"image_to_text": result.num_images, "text_to_image": captioned}
    rows = [
        [
            direction.replace("_", " "),
            *(percent(metrics[f"{direction}_R@{k}"], trials[direction]) for k in RECALLS),
            f"{metrics[f'{direction}_median_rank']:.0f}",
            f"{metrics[f'{direction}_mean_rank']:.1f}",
        ]
        for direction in DIRECTIONS
    ]
    header = ["", *(f"R@{k}, %" for k in RECALLS), "median rank", "mean rank"]
    return "\n\n".join(
        [
            f"`{model.name}` at {model.image_size[0]} x {model.image_size[1]} px on "
            f"{result.num_images} images with {result.num_captions} captions. In brackets, 95 % "
            "intervals (Wilson) with images as trials.",
            *(f"- {remark}" for remark in (*findings, *_remarks(result.features))),
            markdown_table(header, rows),
            "![Recall at every k](recall.png)",
        ]
    )


def _remarks(features: Features) -> list[str]:
    """What does not go without saying about the numbers."""
    remarks = []
    if repeated := _num_repeated(features):
        remarks.append(
            "captions that occur more than once, though no image but their own counts as right: "
            f"{repeated} of {len(features.captions)}"
        )
    if missing := features.uncaptioned:
        remarks.append(
            f"images without a caption, which count as not found: {len(missing)} ({missing[0]}, "
            "...)"
        )
    if features.unreadable:
        key, reason = features.unreadable[0]
        remarks.append(
            "images that cannot be read, which count as not found, and whose captions are not "
            f"looked for: {len(features.unreadable)} ({key}: {reason}, ...)"
        )
    if features.num_nonfinite:
        remarks.append(
            "images and captions with features that are not finite, which count as not found: "
            f"{features.num_nonfinite}"
        )
    return remarks


def _num_repeated(features: Features) -> int:
    return sum(count for count in Counter(features.captions).values() if count > 1)


def _write_ranks_csv(result: RetrievalResult, path: Path) -> None:
    """One line per query: direction, key of the image, caption, rank."""
    features = result.features
    image_keys = [*features.keys, *(key for key, _ in features.unreadable)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["direction", "key", "caption", "rank"])
        for key, rank in zip(image_keys, result.image_to_text.tolist(), strict=True):
            writer.writerow(["image_to_text", key, "", rank])
        queries = zip(
            features.captions, features.owners, result.text_to_image.tolist(), strict=True
        )
        for caption, owner, rank in queries:
            writer.writerow(["text_to_image", features.keys[owner], caption, rank])


def _draw(result: RetrievalResult) -> Figure:
    """Recall at every k, both ways, with what chance would find."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for direction, num_candidates in zip(
        DIRECTIONS, (result.num_captions, len(result.features.images)), strict=True
    ):
        k = np.unique(np.geomspace(1, num_candidates, 200).round())
        recalls = [100 * result.recall(direction, each) for each in k]
        axes.plot(k, recalls, color=_COLOURS[direction], label=direction.replace("_", " "))
    chance = np.geomspace(1, len(result.features.images), 200)
    axes.plot(
        chance,
        100 * chance / chance[-1],
        color=MUTED,
        linestyle=":",
        label="text to image by chance",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 101)
    dress(axes, "Recall at k", xlabel="k", ylabel="found, %")
    add_legend(axes)
    return figure

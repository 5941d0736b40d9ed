"""Find the captions of images, and the images of captions.

An image may have several captions, one per line of its text. To use several processes:
``deepspeed --module linclip_launch.eval retrieval ...``.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ds_linclip.data import LabelledData, clean_text, describe_unreadable
from ds_linclip.inference import LoadedModel
from linclip_eval.commands import inputs, outputs
from linclip_eval.plotting import COLOURS, MUTED, add_legend, dress, new_figure
from linclip_eval.results import markdown_table, percent
from linclip_eval.retrieval import DIRECTIONS, RECALLS, RetrievalResult, retrieval

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    inputs.check_out(options.out)
    with inputs.all_ranks() as mesh:
        model = inputs.model_from_arguments(options, mesh)
        common = inputs.data_options(options, model)
        open_data = partial(LabelledData, options.data, needs_classes=False, **common)
        data = mesh.agree(open_data, (ValueError, OSError))
        result = retrieval(
            model.encode_image,
            model.encode_text,
            data,
            tokenizer=model.tokenizer,
            device=model.device,
            group=mesh.dp.group,
            strict=not options.lenient,
        )
        data.require_readable(result.features.unreadable)
        if mesh.rank == 0:
            _publish(options.out, options.words, model, result, data.findings.describe())


def _publish(
    out: Path,
    words: Sequence[str],
    model: LoadedModel,
    result: RetrievalResult,
    findings: Sequence[str],
) -> None:
    features, metrics = result.features, result.metrics()
    missing = features.uncaptioned
    # The captions of one image are not independent of each other: images are the trials.
    trials = {"image_to_text": result.num_images, "text_to_image": len(np.unique(features.owners))}
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
    counts = Counter(map(clean_text, features.captions)).values()
    num_repeated = sum(count for count in counts if count > 1)
    defects = {
        "captions that occur more than once, where only the image's own one counts as right": (
            num_repeated and f"{num_repeated} of {len(features.captions)}"
        ),
        "images without a caption, which count as not found": (
            missing and f"{len(missing)} ({missing[0]}, ...)"
        ),
        "images that cannot be read, which count as not found, and whose captions are left out": (
            describe_unreadable(features.unreadable)
        ),
    }
    outputs.publish(
        out,
        words,
        model.device,
        title=f"Retrieval of images and captions: {model.title}",
        sections=[
            f"{outputs.describe(model)} on {result.num_images} images with {result.num_captions} "
            "captions. 95 % intervals (Wilson) in brackets, with images as trials.",
            outputs.bullets([*findings, *outputs.remarks(defects)]),
            markdown_table(header, rows),
            "![Recall at every k](recall.png)",
        ],
        tables={"ranks.csv": [("direction", "key", "caption", "rank"), *_ranks(result)]},
        figures={"recall.png": _draw(result)},
        numbers={
            **outputs.model_facts(model),
            "num_images": result.num_images,
            "num_captions": result.num_captions,
            "num_repeated_captions": num_repeated,
            "unreadable": outputs.unreadable_entries(features.unreadable),
            "uncaptioned": missing,
            "findings": findings,
            **metrics,
        },
    )


def _ranks(result: RetrievalResult) -> Iterator[tuple[str, str, str, int]]:
    """Yield direction, key of the image, caption and rank of every query."""
    features = result.features
    keys = [*features.keys, *(image.key for image in features.unreadable)]
    for key, rank in zip(keys, result.image_to_text.tolist(), strict=True):
        yield "image_to_text", key, "", rank
    for caption, owner, rank in zip(
        features.captions, features.owners, result.text_to_image.tolist(), strict=True
    ):
        yield "text_to_image", features.keys[owner], caption, rank


def _draw(result: RetrievalResult) -> Figure:
    """Draw recall at every k in both directions, and the recall of a random order."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    num_images = len(result.features.images)
    for direction, num_candidates, colour in zip(
        DIRECTIONS, (result.num_captions, num_images), COLOURS, strict=False
    ):
        k = np.unique(np.geomspace(1, num_candidates, 200).round())
        recalls = [100 * result.recall(direction, each) for each in k]
        axes.plot(k, recalls, color=colour, label=direction.replace("_", " "))
    k = np.geomspace(1, num_images, 200)
    label = "text to image by chance"
    axes.plot(k, 100 * k / num_images, color=MUTED, linestyle=":", label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 101)
    dress(axes, "Recall at k", xlabel="k", ylabel="found, %")
    add_legend(axes)
    return figure

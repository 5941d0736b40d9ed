"""Fit nearest neighbours and a linear probe to frozen image features.

With several processes, ``deepspeed --module linclip_launch.eval probe ...``, all of them embed
images; the first one then fits the classifiers alone.
"""

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ds_linclip.data import LabelledData, describe_unreadable
from ds_linclip.inference import LoadedModel
from linclip_eval.commands import inputs, outputs
from linclip_eval.features import Features, extract_features
from linclip_eval.plotting import LINEAR, MUTED, add_legend, dress, new_figure
from linclip_eval.probe import Accuracy, LinearProbe, knn, linear_probe
from linclip_eval.results import markdown_table, percent, wilson_interval
from linclip_eval.zero_shot.class_lists import imagenet_classes

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    inputs.check_out(options.out)
    with inputs.all_ranks() as mesh:
        model = inputs.model_from_arguments(options, mesh)
        sets = mesh.agree(partial(_open, options, model), (ValueError, OSError))
        train, test = (
            extract_features(model.encode_image, data, device=model.device, group=mesh.dp.group)
            for data in sets
        )
        for data, features in zip(sets, (train, test), strict=True):
            data.require_readable(features.unreadable)
    # On a large set the fits take hours, longer than the other ranks would wait.
    if mesh.rank > 0:
        return
    neighbors = knn(train, test, num_neighbors=options.num_neighbors, device=model.device)
    probe = linear_probe(train, test, seed=options.seed)
    num_test = probe.accuracy.num_samples
    findings = [finding for data in sets for finding in data.findings.describe()]
    classifiers = {f"{k} nearest neighbours": accuracy for k, accuracy in neighbors.items()}
    rows = [
        [
            name,
            *(percent(accuracy.topk(k), num_test) for k in (1, 5)),
            percent(accuracy.mean_per_class_recall),
        ]
        for name, accuracy in {**classifiers, "linear probe": probe.accuracy}.items()
    ]
    outputs.publish(
        options.out,
        options.words,
        model.device,
        title=f"Classifiers on frozen features: {model.title}",
        sections=[
            f"{outputs.describe(model)}, its image features frozen: learned from "
            f"{len(train.images)} images, scored on {num_test}. 95 % intervals (Wilson) in "
            "brackets.",
            outputs.bullets([*findings, *_remarks(probe, train, test)]),
            markdown_table(["", "top-1, %", "top-5, %", "mean per-class recall, %"], rows),
            "Neighbours vote as in arXiv 2104.14294. The linear probe is that of arXiv 2103.00020, "
            "A.3, but on the features after the projection into the space shared with texts; its "
            f"L2 strength, {probe.strength:.3g}, has the best accuracy on a validation fifth of "
            "the training images.",
            "![Validation accuracy by L2 strength](search.png)",
        ],
        tables={"search.csv": probe.search},
        figures={"search.png": _draw(probe)},
        numbers={
            **outputs.model_facts(model),
            "num_train": len(train.images),
            "num_test": num_test,
            **{
                f"unreadable_{name}": outputs.unreadable_entries(features.unreadable)
                for name, features in (("train", train), ("test", test))
            },
            "findings": findings,
            "knn": {k: _scores(accuracy) for k, accuracy in neighbors.items()},
            "linear_probe": {
                **_scores(probe.accuracy),
                "strength": probe.strength,
                "num_iterations": probe.num_iterations,
                "converged": probe.converged,
                "num_unconverged": probe.num_unconverged,
                "search": [asdict(fit) for fit in probe.search],
            },
        },
    )


def _open(options: argparse.Namespace, model: LoadedModel) -> tuple[LabelledData, LabelledData]:
    classes = imagenet_classes(options.classes, "lemma").ids if options.classes else None
    common = inputs.data_options(options, model) | {"classes": classes}
    train = LabelledData(options.train, split="train", **common)
    test = LabelledData(options.test, **common)
    if train.fingerprint == test.fingerprint:
        raise ValueError(f"--train and --test ({options.test}) must be different images")
    if (most := max(options.num_neighbors)) > train.num_samples:
        raise ValueError(
            f"--num-neighbors ({most}) must be at most {train.num_samples}, the training images"
        )
    if train.classnames != test.classnames:
        raise ValueError(f"classes of --test ({options.test}) must be those of --train, in order")
    return train, test


def _scores(accuracy: Accuracy) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for k in (1, 5):
        scores[f"top{k}"] = accuracy.topk(k)
        scores[f"top{k}_interval"] = wilson_interval(accuracy.topk(k), accuracy.num_samples)
    return scores | {"mean_per_class_recall": accuracy.mean_per_class_recall}


def _remarks(probe: LinearProbe, train: Features, test: Features) -> list[str]:
    """Return what a reader of the numbers must know."""
    final = "not the final one" if probe.converged else "the final one among them"
    count = f"{probe.num_unconverged} of {len(probe.search) + 1}"
    is_at_end = probe.strength in (probe.search[0].strength, probe.search[-1].strength)
    return outputs.remarks(
        {
            "fits of the linear probe that did not converge": (
                probe.num_unconverged and f"{count}, {final}"
            ),
            "the L2 strength is at the end of its range": (
                is_at_end and "a better one may lie beyond"
            ),
            "training images that cannot be read, and are left out": (
                describe_unreadable(train.unreadable)
            ),
            "test images that cannot be read, and count as wrong": (
                describe_unreadable(test.unreadable)
            ),
        }
    )


def _draw(probe: LinearProbe) -> Figure:
    """Draw validation accuracy by strength; fits that did not converge are hollow."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    points = np.array([(fit.strength, 100 * fit.validation_top1) for fit in probe.search])
    converged = np.array([fit.converged for fit in probe.search])
    axes.plot(*points.T, color=LINEAR, linewidth=1.2, alpha=0.5)
    look: dict[str, Any] = {"s": 28, "edgecolor": LINEAR, "zorder": 3}
    axes.scatter(*points[converged].T, facecolor=LINEAR, label="converged", **look)
    axes.scatter(*points[~converged].T, facecolor="white", label="not converged", **look)
    axes.axvline(probe.strength, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    dress(axes, "Validation images", xlabel="L2 strength (dotted: chosen)", ylabel="top-1, %")
    add_legend(axes)
    return figure

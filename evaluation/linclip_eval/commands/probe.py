"""``linclip-eval probe``: nearest neighbours and a linear probe on frozen image features.

Over several processes, ``deepspeed --module linclip_launch.eval probe ...``, images are shared
out; the first process then fits the classifiers alone.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds_linclip.data import LabelledData
from ds_linclip.inference import EvalModel
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.commands.arguments import (
    add_model_arguments,
    add_reading_arguments,
    model_from_arguments,
)
from linclip_eval.features import Features, extract_features
from linclip_eval.plotting import LINEAR, MUTED, add_legend, dress, new_figure
from linclip_eval.probe import Accuracy, LinearProbe, knn, linear_probe
from linclip_eval.results import markdown_table, percent, wilson_interval, write_results
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS, imagenet_classes

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for bad input; what shows before the classifiers are fitted, on all ranks.
        OSError: for a file that cannot be read or written.
    """
    options = _parser().parse_args(arguments)
    mesh = Mesh.create()
    model = model_from_arguments(options, mesh)
    sets = mesh.agree(lambda: _open(options, model), (ValueError, OSError))
    train, test = (
        extract_features(model.encode_image, data, device=model.device, group=mesh.dp.group)
        for data in sets
    )
    mesh.barrier()
    mesh.close()
    if mesh.rank > 0:  # the rest takes hours on large sets, longer than ranks wait for each other
        return
    probes = _Probes(
        train=train,
        test=test,
        knn=knn(train, test, num_neighbors=options.num_neighbors, device=model.device),
        linear_probe=linear_probe(train, test, seed=options.seed),
        findings=[finding for data in sets for finding in data.findings.describe()],
    )
    _write(options.out, probes, model, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linclip-eval probe", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--train", required=True, help="folder of labelled images to learn from")
    parser.add_argument("--test", required=True, help="one of the same classes to score on")
    parser.add_argument(
        "--classes",
        help=f"{', '.join(IMAGENET_LISTS)}, or a file with a synset a line, for folders that name "
        "no classes",
    )
    parser.add_argument(
        "--num-neighbors", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images held back for a choice")
    add_reading_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _open(options: argparse.Namespace, model: EvalModel) -> tuple[LabelledData, LabelledData]:
    classes = imagenet_classes(options.classes, "lemma").ids if options.classes else None
    train, test = (
        LabelledData(
            folder,
            transform=model.transform,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            classes=classes,
            split=split,
            strict=not options.lenient,
        )
        for folder, split in ((options.train, "train"), (options.test, "test"))
    )
    if train.fingerprint == test.fingerprint:
        raise ValueError(f"--train and --test ({options.test}) must be different images")
    if (most := max(options.num_neighbors)) > train.num_samples:
        raise ValueError(
            f"--num-neighbors ({most}) must be at most {train.num_samples}, the training images"
        )
    if train.classnames != test.classnames:
        raise ValueError(f"classes of --test ({options.test}) must be those of --train, in order")
    return train, test


@dataclass(frozen=True, kw_only=True)
class _Probes:
    """What was learned, and what it scored."""

    train: Features
    test: Features
    #: Number of neighbours -> accuracy.
    knn: Mapping[int, Accuracy]
    linear_probe: LinearProbe
    findings: Sequence[str]


def _write(out: Path, probes: _Probes, model: EvalModel, arguments: Sequence[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    probe = probes.linear_probe
    search = [asdict(fit) for fit in probe.search]
    with (out / "search.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(search[0]))
        writer.writeheader()
        writer.writerows(search)
    _draw(probe).savefig(out / "search.png")
    numbers = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "image_size": list(model.image_size),
        "num_train": len(probes.train.images),
        "num_test": probe.accuracy.num_samples,
        "unreadable_train": _unreadable(probes.train),
        "unreadable_test": _unreadable(probes.test),
        "findings": list(probes.findings),
        "knn": {k: _scores(accuracy) for k, accuracy in probes.knn.items()},
        "linear_probe": {
            **_scores(probe.accuracy),
            "strength": probe.strength,
            "num_iterations": probe.num_iterations,
            "converged": probe.converged,
            "num_unconverged": probe.num_unconverged,
            "search": search,
        },
    }
    write_results(
        out,
        command=("probe", *arguments),
        title=f"Classifiers on frozen features: {model.title}",
        body=_summary(probes, model),
        numbers=numbers,
        device=model.device,
    )
    print((out / "summary.md").read_text(encoding="utf-8"))


def _scores(accuracy: Accuracy) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for k in (1, 5):
        hits = int((accuracy.ranks <= k).sum())
        scores[f"top{k}"] = accuracy.topk(k)
        scores[f"top{k}_interval"] = wilson_interval(hits, accuracy.num_samples)
    return scores | {"mean_per_class_recall": accuracy.mean_per_class_recall}


def _unreadable(features: Features) -> list[dict[str, str]]:
    return [{"key": key, "reason": reason} for key, reason in features.unreadable]


def _summary(probes: _Probes, model: EvalModel) -> str:
    probe = probes.linear_probe
    num_test = probe.accuracy.num_samples
    rows = [
        [
            name,
            *(percent(accuracy.topk(k), num_test) for k in (1, 5)),
            percent(accuracy.mean_per_class_recall),
        ]
        for name, accuracy in (
            *((f"{k} nearest neighbours", accuracy) for k, accuracy in probes.knn.items()),
            ("linear probe", probe.accuracy),
        )
    ]
    return "\n\n".join(
        [
            f"`{model.name}` at {model.image_size[0]} x {model.image_size[1]} px, its image "
            f"features frozen: learned from {len(probes.train.images)} images, scored on "
            f"{num_test}. In brackets, 95 % intervals (Wilson).",
            *(f"- {remark}" for remark in (*probes.findings, *_remarks(probes))),
            markdown_table(["", "top-1, %", "top-5, %", "mean per-class recall, %"], rows),
            "Neighbours vote as in arXiv 2104.14294. The linear probe is that of arXiv 2103.00020, "
            "A.3, but on the features behind the projection into the space shared with texts; its "
            f"L2 strength, {probe.strength:.3g}, did best on a fifth of the training images that "
            "was held back for the choice.",
            "![Accuracy on the images held back, by L2 strength](search.png)",
        ]
    )


def _remarks(probes: _Probes) -> list[str]:
    """What does not go without saying about the numbers."""
    remarks = []
    probe = probes.linear_probe
    if probe.num_unconverged:
        last = "not the last one" if probe.converged else "the last one among them"
        count = f"{probe.num_unconverged} of {len(probe.search) + 1}"
        remarks.append(f"fits of the linear probe that did not converge: {count}, {last}")
    if probe.strength in (probe.search[0].strength, probe.search[-1].strength):
        remarks.append("the L2 strength is at the end of its range: a better one may lie beyond")
    for features, what in (
        (probes.train, "training images that cannot be read, and are left out"),
        (probes.test, "test images that cannot be read, and count as wrong"),
    ):
        if features.unreadable:
            key, reason = features.unreadable[0]
            remarks.append(f"{what}: {len(features.unreadable)} ({key}: {reason}, ...)")
    return remarks


def _draw(probe: LinearProbe) -> Figure:
    """Accuracy on images held back by strength; hollow where the fit was cut off."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    strengths = [fit.strength for fit in probe.search]
    scores = [100 * fit.validation_top1 for fit in probe.search]
    axes.plot(strengths, scores, color=LINEAR, linewidth=1.2, alpha=0.5)
    for converged, label, face in ((True, "converged", LINEAR), (False, "cut off", "white")):
        shown = [i for i, fit in enumerate(probe.search) if fit.converged is converged]
        axes.scatter(
            [strengths[i] for i in shown],
            [scores[i] for i in shown],
            s=28,
            facecolor=face,
            edgecolor=LINEAR,
            zorder=3,
            label=label,
        )
    axes.axvline(probe.strength, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    dress(axes, "Images held back", xlabel="L2 strength (dotted: chosen)", ylabel="top-1, %")
    add_legend(axes)
    return figure

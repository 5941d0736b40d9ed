"""Decompose what a model's decisions are made from: image and caption, or centre and surroundings.

With several processes, ``deepspeed --module linclip_launch.eval audit ...``, all of them embed
images; the first one then does the rest alone.
"""

import argparse
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from ds_linclip.data import LabelledData, UnreadableImage, describe_unreadable
from ds_linclip.inference import LoadedModel
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.audit.estimate import Estimate, check_samples, estimate
from linclip_eval.audit.figure import draw_audit
from linclip_eval.audit.questions import (
    Audited,
    ask_match,
    ask_parts,
    captioned,
    parts_encoder,
    split_parts,
)
from linclip_eval.commands import inputs, outputs
from linclip_eval.features import extract_features
from linclip_eval.results import markdown_table, percent, wilson_interval
from linclip_eval.zero_shot.classifier import build_classifier
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = ["run"]

_CENTRE_SHARE = 0.5
#: Question -> the names of its two sources.
_SOURCES = {"match": ("image", "caption"), "parts": ("centre", "surroundings")}
_QUESTIONS = {
    "match": "Does the model say that an image and a caption belong together? Every image is shown "
    "with its own caption and with a foreign one; yes is a cosine above the median of all pairs, "
    "{threshold:.4f}.",
    "parts": "Which class does the model give to an image? Its sources are the features of the "
    "central crop, {share:.0%} of the area, and those of the image without it.",
}
_NOTES = """\
Information in bits. The parts are those of Bertschinger et al. (2014): *unique* is what only one
source tells of the decision, *redundant* what either tells, *synergistic* what both tell only
together. In brackets: 95 % intervals of a bootstrap over images, reflected at the estimate.
*Null*: mean and 95 % quantile of the same number after the decisions were shuffled; an estimate is
too large by about that mean. *p*: the share of shuffles that give as much or more.

Sources are k-means clusters of features, the decision is the model's own: the numbers say what the
model uses, not what is true, and count only what the clusters keep of the sources."""


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    _check(options)
    inputs.check_out(options.out)
    with inputs.all_ranks() as mesh:
        model = inputs.model_from_arguments(options, mesh)
        ask = {"match": _match, "parts": _parts}[options.question]
        audited, findings, unreadable = ask(options, model, mesh)
    # Repeating the decomposition takes minutes, longer than the other ranks would wait.
    if mesh.rank > 0:
        return
    estimates, gap = estimate(audited.samples, num_repeats=options.repeats, seed=options.seed)
    _publish(options, model, audited, estimates, gap, findings, unreadable)


def _check(options: argparse.Namespace) -> None:
    """Check that no option is given that the question does not have."""
    if options.question == "parts":
        return
    for name in ("groups", "centre_share", "classes", "names", "templates"):
        value = getattr(options, name)
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} ({value}) must be left out with --question match: it "
                "belongs to --question parts"
            )


def _match(
    options: argparse.Namespace, model: LoadedModel, mesh: Mesh
) -> tuple[Audited, Sequence[str], Sequence[UnreadableImage]]:
    def open_data() -> LabelledData:
        # Classes, where the folder has them, keep foreign captions from being right.
        has_classes = (Path(options.data) / "classnames.txt").is_file()
        common = inputs.data_options(options, model)
        data = LabelledData(options.data, needs_classes=has_classes, **common)
        check_samples(2 * data.num_samples, options.bins, 2)
        return data

    data = mesh.agree(open_data, (ValueError, OSError))
    features = extract_features(
        model.encode_image,
        data,
        device=model.device,
        embed_texts=lambda texts: model.encode_text(model.tokenizer(texts)),
        group=mesh.dp.group,
    )
    data.require_readable(features.unreadable)
    findings = data.findings.describe()
    if options.lenient and (missing := features.uncaptioned):
        findings.append(
            f"images without a caption, which are left out: {len(missing)} ({missing[0]}, ...)"
        )
        features = captioned(features)
    ask = partial(
        ask_match, features, num_bins=options.bins, device=model.device, seed=options.seed
    )
    return mesh.agree(ask, (ValueError,)), findings, features.unreadable


def _parts(
    options: argparse.Namespace, model: LoadedModel, mesh: Mesh
) -> tuple[Audited, Sequence[str], Sequence[UnreadableImage]]:
    def open_task() -> ZeroShotTask:
        task = ZeroShotTask.open(
            options.data,
            classes=options.classes,
            names=options.names or "lemma",
            templates=options.templates or "one",
            **inputs.data_options(options, model),
        )
        num_outcomes = options.groups or len(task.classes)
        if num_outcomes > len(task.classes):
            raise ValueError(
                f"--groups ({num_outcomes}) must be at most {len(task.classes)}, the classes"
            )
        check_samples(task.data.num_samples, options.bins, num_outcomes)
        return task

    task = mesh.agree(open_task, (ValueError, OSError))
    encode = parts_encoder(model.encode_image, options.centre_share or _CENTRE_SHARE)
    features = extract_features(encode, task.data, device=model.device, group=mesh.dp.group)
    task.data.require_readable(features.unreadable)
    classifier = build_classifier(
        model.encode_text,
        task.classes.texts,
        task.templates,
        tokenizer=model.tokenizer,
        device=model.device,
        group=mesh.dp.group,
    )
    ask = partial(
        ask_parts,
        split_parts(features),
        classifier,
        [task.classes.title(label) for label in range(len(task.classes))],
        num_bins=options.bins,
        num_groups=options.groups,
        seed=options.seed,
    )
    return mesh.agree(ask, (ValueError,)), task.data.findings.describe(), features.unreadable


def _publish(
    options: argparse.Namespace,
    model: LoadedModel,
    audited: Audited,
    estimates: Sequence[Estimate],
    gap: float,
    findings: Sequence[str],
    unreadable: Sequence[UnreadableImage],
) -> None:
    samples = audited.samples
    first, second = _SOURCES[options.question]
    names = {
        "unique_1": f"unique: {first}",
        "unique_2": f"unique: {second}",
        "redundant": "redundant",
        "synergistic": "synergistic",
        "total": "together",
    }
    counts = Counter(samples.outcomes.tolist())
    shares = np.array(list(counts.values())) / len(samples.outcomes)
    entropy = float(-(shares * np.log2(shares)).sum())
    num_samples, num_images = len(samples.outcomes), int(samples.units.max()) + 1
    share = options.centre_share or _CENTRE_SHARE
    question = _QUESTIONS[options.question].format(threshold=audited.threshold or 0.0, share=share)
    outcomes = "; ".join(
        f"{textwrap.shorten(name, 60, placeholder=' ...')}: {counts[number]}"
        for number, name in enumerate(audited.outcomes)
    )
    right = float(audited.right.mean())
    rows = [
        (
            names[each.part],
            f"{each.bits:.4f} ({each.low:.4f} to {each.high:.4f})",
            f"{each.null_mean:.4f}",
            f"{each.null_high:.4f}",
            f"{each.p_value:.3f}",
        )
        for each in estimates
    ]
    lost = {"images that cannot be read, and are left out": describe_unreadable(unreadable)}
    outputs.publish(
        options.out,
        options.words,
        model.device,
        title=f"Audit of {' and '.join(_SOURCES[options.question])}: {model.title}",
        sections=[
            f"{outputs.describe(model)} on {num_images} images of `{options.data}`, "
            f"{num_samples} decisions, {options.bins} clusters of each source. {question}",
            f"The decisions have {entropy:.4f} bits; {estimates[-1].bits:.4f} of them follow from "
            f"the clusters. {percent(right, num_images)} % are right.",
            outputs.bullets([*findings, *outputs.remarks(lost), f"decisions ({outcomes})"]),
            markdown_table(("", "bits (95 % interval)", "null", "null, 95 %", "p"), rows),
            "![Parts of the decision's information](parts.png)",
            _NOTES,
            f"{options.repeats} shuffles and as many bootstrap samples, seed {options.seed}; the "
            f"optimisation is exact to {gap:.1e} bits.",
        ],
        tables={
            "parts.csv": estimates,
            "samples.csv": [("key", first, second, "decision", "right"), *_rows(audited)],
        },
        figures={"parts.png": draw_audit(estimates, names)},
        numbers={
            **outputs.model_facts(model),
            "question": options.question,
            "sources": [first, second],
            "num_images": num_images,
            "num_samples": num_samples,
            "num_bins": options.bins,
            "num_repeats": options.repeats,
            "seed": options.seed,
            "threshold": audited.threshold,
            "centre_share": share if options.question == "parts" else None,
            "outcomes": [
                {"name": name, "count": counts[i]} for i, name in enumerate(audited.outcomes)
            ],
            "entropy": entropy,
            "right": right,
            "right_interval": wilson_interval(right, num_images),
            "gap": gap,
            "parts": [asdict(each) for each in estimates],
            "unreadable": outputs.unreadable_entries(unreadable),
            "findings": findings,
        },
    )


def _rows(audited: Audited) -> Iterator[tuple[object, ...]]:
    """Yield the image, the clusters and the decision of every sample."""
    samples = audited.samples
    numbers = (samples.first, samples.second, samples.outcomes, audited.right.astype(np.int64))
    yield from zip(audited.keys, *(each.tolist() for each in numbers), strict=True)

"""Classify images by the names of their classes, ImageNet-21K's among them.

An interrupted run resumes when it is started again with the same arguments. To use several
processes: ``deepspeed --module linclip_launch.eval zero-shot ...``.
"""

import argparse
import resource
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ds_linclip.config import load_config
from ds_linclip.inference import LoadedModel
from linclip_eval.commands import inputs, outputs
from linclip_eval.results import markdown_table, percent, wilson_interval
from linclip_eval.zero_shot.evaluate import ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = ["per_class_table", "run"]

_NUM_CONFUSIONS_SHOWN = 20
#: Accuracy in ``results.json`` -> its name in the summary.
_SHARES = {
    "top1": "top-1",
    "top5": "top-5",
    "top10": "top-10",
    "merged_top1": "top-1, classes with the same texts merged",
    "merged_top5": "top-5, classes with the same texts merged",
    "hierarchical_top1": "top-1, WordNet ancestors count as right",
}


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    with inputs.all_ranks() as mesh:
        model = inputs.model_from_arguments(options, mesh)
        out = mesh.agree(partial(_complete, options, model), (ValueError, OSError))
        task, result = inputs.score_task(options, options.data, model, mesh, out)
        if mesh.rank == 0:
            _publish(out, options.words, model, task, result)


def _complete(options: argparse.Namespace, model: LoadedModel) -> Path:
    """Fill in missing options from the model's run and return the folder of results."""
    checkpoint = Path(model.name)
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None
    if options.data is None:
        config = load_config(checkpoint / "config.yaml").eval if run else None
        if config is None or config.data is None:
            raise ValueError("--data must name a folder of images: the model names none")
        options.data = config.data
        options.classes = options.classes or config.classes
        options.names = options.names or config.names
        options.templates = options.templates or config.templates
        if options.max_bad_samples is None:
            options.max_bad_samples = config.max_bad_samples
    if options.out is not None:
        out = Path(options.out)
    elif run is not None:
        out = run / "eval" / checkpoint.name
    else:
        raise ValueError("--out must name a folder: the model is not a run folder")
    inputs.check_out(out)
    return out


def _publish(
    out: Path,
    words: Sequence[str],
    model: LoadedModel,
    task: ZeroShotTask,
    result: ZeroShotResult,
) -> None:
    classes, count = result.classes, result.num_samples
    num_empty = int((result.class_samples == 0).sum())
    num_equal = sum(n for n in Counter(classes.texts).values() if n > 1)
    findings, confusions = outputs.zero_shot_remarks(task, result), result.confusions()
    shares = {
        **{f"top{k}": result.topk(k) for k in (1, 5, 10)},
        **{f"merged_top{k}": result.merged_topk(k) for k in (1, 5)},
        "hierarchical_top1": result.hierarchical_top1,
    }
    known = {name: share for name, share in shares.items() if share is not None}
    recall = result.mean_per_class_recall
    rows = [(_SHARES[name], percent(share, count)) for name, share in known.items()]
    baseline = result.best_constant_answer
    if baseline is not None:
        label, share = baseline
        answer = f"the same, if the answer were always {classes.title(label)!r}"
        rows.append((answer, percent(share)))
    rows.append(("mean per-class recall", percent(recall)))
    sections = [
        f"{outputs.describe(model)} on {count} images of {len(classes) - num_empty} of "
        f"{len(classes)} classes of {classes.name}, {len(task.templates)} templates; {num_equal} "
        f"classes share their texts with others, {len(result.unreadable)} images could not be read "
        "and count as wrong.",
        outputs.bullets(findings),
        markdown_table(("", "% (95 % interval)"), rows),
    ]
    if confusions:
        shown = [
            (classes.title(true), classes.title(taken), f"{n} of {result.class_samples[true]}")
            for true, taken, n in confusions[:_NUM_CONFUSIONS_SHOWN]
        ]
        sections += [
            "Most frequent confusions (all in `confusions.csv`, every class in `per_class.csv`):",
            markdown_table(("class", "taken for", "images"), shown, align="llr"),
        ]
    header = ("class", "name", "taken_for", "name_of_taken_for", "num_images")
    wrong = [
        (classes.ids[true], classes.title(true), classes.ids[taken], classes.title(taken), n)
        for true, taken, n in confusions
    ]
    outputs.publish(
        out,
        words,
        model.device,
        title=f"Zero-shot classification: {model.title}",
        sections=sections,
        tables={"per_class.csv": per_class_table(result), "confusions.csv": [header, *wrong]},
        numbers={
            **outputs.model_facts(model),
            "classes": classes.name,
            "num_classes": len(classes),
            "num_classes_without_images": num_empty,
            "num_classes_of_equal_texts": num_equal,
            "num_templates": len(task.templates),
            "num_samples": count,
            "num_unreadable": len(result.unreadable),
            "unreadable": outputs.unreadable_entries(result.unreadable),
            **shares,
            **{f"{name}_interval": wilson_interval(known[name], count) for name in known},
            "hierarchical_baseline_top1": baseline and baseline[1],
            "hierarchical_baseline_class": baseline and classes.ids[baseline[0]],
            "mean_per_class_recall": recall,
            "findings": findings,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    )


def per_class_table(result: ZeroShotResult) -> list[tuple[object, ...]]:
    """Return a header and a row per class, with the class its images are most often taken for.

    The accuracies of a class without images are None.
    """
    classes = result.classes
    most_confused: dict[int, tuple[str, int]] = {}
    for true, taken, count in result.confusions():
        most_confused.setdefault(true, (classes.ids[taken], count))
    hits = [result.class_hits(k).tolist() for k in (1, 5, 10)]
    header = ("label", "class", "name", "num_samples", "top1", "top5", "top10")
    table: list[tuple[object, ...]] = [(*header, "most_confused_with", "num_confused")]
    for label, samples in enumerate(result.class_samples.tolist()):
        scores = (class_hits[label] / samples if samples else None for class_hits in hits)
        confused = most_confused.get(label, ("", 0))
        table.append((label, classes.ids[label], classes.title(label), samples, *scores, *confused))
    return table

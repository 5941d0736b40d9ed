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
from typing import Any

from ds_linclip.config import load_config
from ds_linclip.inference import LoadedModel
from linclip_eval.commands import inputs, outputs
from linclip_eval.results import markdown_table, percent
from linclip_eval.zero_shot.evaluate import ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = ["main", "write_per_class_csv"]

_NUM_CONFUSIONS_SHOWN = 20


def main(arguments: Sequence[str]) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    parser = argparse.ArgumentParser(prog="linclip-eval zero-shot", description=__doc__)
    inputs.add_model_arguments(parser)
    parser.add_argument(
        "--data",
        help="folder of images: tars named by synsets, folders named by synsets, or webdataset "
        "shards; default: eval.data of the run, with its classes, names and templates",
    )
    inputs.add_task_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: a folder in the run folder")
    options = parser.parse_args(arguments)
    with inputs.all_ranks() as mesh:
        model = inputs.model_from_arguments(options, mesh)
        out = mesh.agree(partial(_complete, options, model), (ValueError, OSError))
        task, result = inputs.score_task(options, options.data, model, mesh, out)
        if mesh.rank == 0:
            _write(out, result, task, model, arguments)


def write_per_class_csv(result: ZeroShotResult, path: Path) -> None:
    """Write one line per class: label, id, name, images, top-1/5/10 accuracy, and the class that
    its images are most often confused with.

    The accuracies of a class without images are left empty.
    """
    classes = result.classes
    most_confused: dict[int, tuple[str, int]] = {}
    for true, predicted, count in result.confusions():
        most_confused.setdefault(true, (classes.ids[predicted], count))
    hits = [result.class_hits(k).tolist() for k in (1, 5, 10)]
    rows = []
    for label, samples in enumerate(result.class_samples.tolist()):
        scores = [class_hits[label] / samples if samples else "" for class_hits in hits]
        confused = most_confused.get(label, ("", 0))
        rows.append([label, classes.ids[label], classes.title(label), samples, *scores, *confused])
    header = ["label", "class", "name", "num_samples", "top1", "top5", "top10"]
    outputs.write_csv(path, [*header, "most_confused_with", "num_confused"], rows)


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
    if options.out is not None:
        return Path(options.out)
    if run is None:
        raise ValueError("--out must name a folder: the model is not a run folder")
    return run / "eval" / checkpoint.name


def _write(
    out: Path,
    result: ZeroShotResult,
    task: ZeroShotTask,
    model: LoadedModel,
    arguments: Sequence[str],
) -> None:
    classes, count = result.classes, result.num_samples
    confusions = result.confusions()
    write_per_class_csv(result, out / "per_class.csv")
    outputs.write_csv(
        out / "confusions.csv",
        ["class", "name", "taken_for", "name_of_taken_for", "num_images"],
        (
            [classes.ids[true], classes.title(true), classes.ids[taken], classes.title(taken), n]
            for true, taken, n in confusions
        ),
    )
    shares: dict[str, float | None] = {
        **{f"top{k}": result.topk(k) for k in (1, 5, 10)},
        **{f"merged_top{k}": result.merged_topk(k) for k in (1, 5)},
        "hierarchical_top1": result.hierarchical_top1,
    }
    numbers: dict[str, Any] = {
        **outputs.model_facts(model),
        "classes": classes.name,
        "num_classes": len(classes),
        "num_classes_without_images": int((result.class_samples == 0).sum()),
        "num_classes_of_equal_texts": sum(n for n in Counter(classes.texts).values() if n > 1),
        "num_templates": len(task.templates),
        "num_samples": count,
        "num_unreadable": result.num_unreadable,
        "num_nonfinite": result.num_nonfinite,
        **shares,
        **{
            f"{name}_interval": outputs.share_interval(share, count)
            for name, share in shares.items()
            if share is not None
        },
        "mean_per_class_recall": result.mean_per_class_recall,
        "findings": task.data.findings.describe(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    rows = [
        ("top-1", percent(numbers["top1"], count)),
        ("top-5", percent(numbers["top5"], count)),
        ("top-10", percent(numbers["top10"], count)),
        ("top-1, classes with the same texts merged", percent(numbers["merged_top1"], count)),
        ("top-5, classes with the same texts merged", percent(numbers["merged_top5"], count)),
        ("mean per-class recall", percent(numbers["mean_per_class_recall"])),
    ]
    if result.hierarchical_top1 is not None:
        rows.insert(
            5, ("top-1, WordNet ancestors count as right", percent(result.hierarchical_top1, count))
        )
    paragraphs = [
        f"{outputs.describe(model)} on {count} images of "
        f"{len(classes) - numbers['num_classes_without_images']} of {len(classes)} classes of "
        f"{classes.name}, {len(task.templates)} templates; "
        f"{numbers['num_classes_of_equal_texts']} classes share their texts with others, "
        f"{result.num_unreadable} images could not be read and {result.num_nonfinite} had "
        "logits that are not finite: both count as wrong.",
        outputs.bullets(numbers["findings"]),
        markdown_table(("", "% (95 % interval)"), rows),
    ]
    if confusions:
        shown = [
            (classes.title(true), classes.title(taken), f"{n} of {result.class_samples[true]}")
            for true, taken, n in confusions[:_NUM_CONFUSIONS_SHOWN]
        ]
        paragraphs += [
            "Most frequent confusions (all in `confusions.csv`, every class in `per_class.csv`):",
            markdown_table(("class", "taken for", "images"), shown, align="llr"),
        ]
    outputs.publish(
        out,
        command=("zero-shot", *arguments),
        title=f"Zero-shot classification: {model.title}",
        paragraphs=paragraphs,
        numbers=numbers,
        device=model.device,
    )

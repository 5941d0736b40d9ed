"""``linclip-eval zero-shot``: score a model on held-out classes, ImageNet-21K's among them.

Over several processes: ``deepspeed --module linclip_launch.eval zero-shot ...``. A run that was
cut off continues where it stopped when it is started again with the same arguments.
"""

import argparse
import csv
import resource
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ds_linclip.config import load_config
from ds_linclip.inference import EvalModel
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.commands.arguments import (
    add_model_arguments,
    add_task_arguments,
    model_from_arguments,
    task_from_arguments,
)
from linclip_eval.results import markdown_table, percent, wilson_interval, write_results
from linclip_eval.zero_shot.evaluate import ZeroShotResult, write_per_class_csv
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = ["main"]

_NUM_CONFUSIONS_SHOWN = 20


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for bad input, on all ranks.
        OSError: for a file that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="linclip-eval zero-shot", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        help="folder of images: tars named by synsets, folders named by synsets, or webdataset "
        "shards; default: eval.data of the run, with its classes, names and templates",
    )
    add_task_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: in the run folder")
    options = parser.parse_args(arguments)
    mesh = Mesh.create()
    model = model_from_arguments(options, mesh)
    out = mesh.agree(partial(_fill_in, options, model), (ValueError, OSError))
    task = mesh.agree(
        partial(task_from_arguments, options, options.data, model), (ValueError, OSError)
    )
    result = task.score(
        model,
        tokenizer=model.tokenizer,
        device=model.device,
        group=mesh.dp.group,
        keep_in=out,
        fingerprint=model.fingerprint,
    )
    if mesh.rank == 0:
        _write(out, result, task, model, arguments)
    mesh.barrier()
    mesh.close()


def _fill_in(options: argparse.Namespace, model: EvalModel) -> Path:
    """Take from the run what the command line leaves open; returns where results go."""
    checkpoint = Path(model.name)
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None
    if options.data is None:
        asked = load_config(checkpoint / "config.yaml").eval if run else None
        if asked is None or asked.data is None:
            raise ValueError("--data must name a folder of images: the model names none")
        options.data = asked.data
        options.classes = options.classes or asked.classes
        options.names = options.names or asked.names
        options.templates = options.templates or asked.templates
    if options.out is not None:
        return Path(options.out)
    if run is None:
        raise ValueError("--out must name a folder: the model is no run folder")
    return run / "eval" / checkpoint.name


def _write(
    out: Path,
    result: ZeroShotResult,
    task: ZeroShotTask,
    model: EvalModel,
    arguments: Sequence[str],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_per_class_csv(result, out / "per_class.csv")
    _write_confusions(result, out / "confusions.csv")
    classes, count = result.classes, result.num_samples
    shares: dict[str, float | None] = {
        **{f"top{k}": result.topk(k) for k in (1, 5, 10)},
        **{f"merged_top{k}": result.merged_topk(k) for k in (1, 5)},
        "hierarchical_top1": result.hierarchical_top1,
    }
    num_empty = int((result.class_samples == 0).sum())
    collided = sum(n for n in Counter(classes.texts).values() if n > 1)
    numbers: dict[str, Any] = {
        "model": model.name,
        "image_size": list(model.image_size),
        "classes": classes.name,
        "num_classes": len(classes),
        "num_classes_without_images": num_empty,
        "num_classes_of_equal_texts": collided,
        "num_templates": len(task.templates),
        "num_samples": count,
        "num_unreadable": result.num_unreadable,
        "num_nonfinite": result.num_nonfinite,
        **shares,
        **{
            f"{name}_interval": wilson_interval(round(share * count), count)
            for name, share in shares.items()
            if share is not None
        },
        "mean_per_class_recall": result.mean_per_class_recall,
        "findings": task.data.findings.describe(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write_results(
        out,
        command=("zero-shot", *arguments),
        title=f"Zero-shot classification: {model.title}",
        body=_summary(result, numbers),
        numbers=numbers,
        device=model.device,
    )
    print((out / "summary.md").read_text(encoding="utf-8"))


def _summary(result: ZeroShotResult, numbers: dict[str, Any]) -> str:
    count = result.num_samples
    rows = [
        ("top-1", percent(numbers["top1"], count)),
        ("top-5", percent(numbers["top5"], count)),
        ("top-10", percent(numbers["top10"], count)),
        ("top-1, classes of equal texts merged", percent(numbers["merged_top1"], count)),
        ("top-5, classes of equal texts merged", percent(numbers["merged_top5"], count)),
        ("mean per-class recall", percent(numbers["mean_per_class_recall"])),
    ]
    if numbers["hierarchical_top1"] is not None:
        share = percent(numbers["hierarchical_top1"], count)
        rows.insert(5, ("top-1, or above it in WordNet", share))
    parts = [
        f"`{numbers['model']}` at {numbers['image_size'][0]} x {numbers['image_size'][1]} px on "
        f"{count} images of {numbers['num_classes'] - numbers['num_classes_without_images']} of "
        f"{numbers['num_classes']} classes of {numbers['classes']}, {numbers['num_templates']} "
        "templates; "
        f"{numbers['num_classes_of_equal_texts']} classes share their texts with others, "
        f"{numbers['num_unreadable']} images could not be read and {numbers['num_nonfinite']} had "
        "logits that are not finite: both count as wrong.",
        *(f"- {line}" for line in numbers["findings"]),
        markdown_table(("", "% (95 % interval)"), rows),
    ]
    if confusions := result.confusions()[:_NUM_CONFUSIONS_SHOWN]:
        classes, samples = result.classes, result.class_samples
        confused = [
            (classes.title(true), classes.title(taken), f"{number} of {samples[true]}")
            for true, taken, number in confusions
        ]
        parts += [
            "Most frequent confusions (all in `confusions.csv`, every class in `per_class.csv`):",
            markdown_table(("class", "taken for", "images"), confused, align="llr"),
        ]
    return "\n\n".join(parts)


def _write_confusions(result: ZeroShotResult, path: Path) -> None:
    classes = result.classes
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "taken_for", "name_of_taken_for", "num_images"])
        for true, taken, count in result.confusions():
            ids = classes.ids
            writer.writerow(
                [ids[true], classes.title(true), ids[taken], classes.title(taken), count]
            )

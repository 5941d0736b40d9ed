"""``linclip-eval zero-shot``: score a model on held-out classes, ImageNet-21K's among them.

Over several processes: ``deepspeed launch/eval.py zero-shot ...``. A run that was cut off goes on
where it was when it is started again with the same arguments.
"""

import argparse
import csv
import hashlib
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import open_clip
from torch import Tensor

from ds_linclip.checkpoint import latest_checkpoint
from ds_linclip.config import load_config
from ds_linclip.data import LabelledData
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.class_lists import IMAGENET_LISTS, ClassList, NamePolicy, imagenet_classes
from linclip_eval.classifier import ClassifierCache, Template, build_classifier
from linclip_eval.models import EvalModel, add_model_arguments, model_from_arguments
from linclip_eval.results import markdown_table, percent, wilson_interval, write_results
from linclip_eval.zero_shot import ZeroShotResult, write_per_class_csv, zero_shot

__all__ = ["main"]

_TEMPLATES: dict[str, Sequence[Template]] = {
    "one": ("a photo of a {}.",),
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
}
_NUM_CONFUSIONS_SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linclip-eval zero-shot", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        help="folder of images: tars named by synsets, folders named by synsets, or webdataset "
        "shards; default: eval.data of the run",
    )
    parser.add_argument(
        "--classes",
        help=f"{', '.join(IMAGENET_LISTS)}, or a file with a synset a line; without it the data "
        "must be in clip_benchmark's layout and name their classes and templates",
    )
    parser.add_argument("--names", choices=get_args(NamePolicy), default="lemma")
    parser.add_argument(
        "--templates",
        default="one",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with a "
        "template a line",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images, per process")
    parser.add_argument("--num-workers", type=int, default=2, help="decoding, per process")
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="go on in spite of unknown or empty classes and images that cannot be read; they are "
        "counted, and such images count as wrong",
    )
    parser.add_argument("--out", type=Path, help="default: in the run folder")
    parser.add_argument("--cache", type=Path, help="features of classes; default: in --out")
    return parser


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    mesh = Mesh.create()
    if options.batch_size < 1:
        raise ValueError(f"--batch-size ({options.batch_size}) must be at least 1")
    group = mesh.dp.group if mesh.dp.size > 1 else None
    out, held_out = _defaults(options)
    model = mesh.agree(lambda: model_from_arguments(options, mesh))
    data, classes, templates = mesh.agree(lambda: _open(options, held_out, model))
    classifier = build_classifier(
        model.encode_text,
        classes.texts,
        templates,
        tokenizer=model.tokenizer,
        device=mesh.device,
        group=group,
        cache=ClassifierCache(options.cache or out / "classifier", model.fingerprint),
    )
    name = _evaluation_name(model, classifier, data)
    result = zero_shot(
        model.encode_image, classifier, data, classes, group=group, parts=out / "parts" / name
    )
    if mesh.rank == 0:
        _write(out, result, data, model, len(templates), arguments)
    mesh.barrier()
    mesh.close()


def _defaults(options: argparse.Namespace) -> tuple[Path, str]:
    """Where results go, and the data."""
    run = Path(options.model)
    is_run = (run / "config.yaml").exists() and (run / "checkpoints").exists()
    of_run = load_config(run / "config.yaml").eval.data if is_run else None
    held_out = options.data or of_run
    if held_out is None:
        raise ValueError("--data must name a folder of images: the model names none")
    if options.out is not None:
        return options.out, held_out
    if not is_run:
        raise ValueError("--out must name a folder: the model is no run folder")
    return run / "eval" / latest_checkpoint(run).name, held_out


def _open(
    options: argparse.Namespace, folder: str, model: EvalModel
) -> tuple[LabelledData, ClassList, Sequence[Template]]:
    classes = options.classes and imagenet_classes(options.classes, options.names)
    data = LabelledData(
        folder,
        transform=model.transform,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        classes=classes.ids if classes else None,
        strict=not options.lenient,
    )
    if classes is None:
        return data, ClassList.of_names(folder, data.classnames), data.templates
    return data, classes, _read_templates(options.templates)


def _read_templates(name: str) -> Sequence[Template]:
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--templates ({name}) must be {', '.join(_TEMPLATES)}, or a readable file"
        ) from error
    return [line for line in lines if line.strip()]


def _evaluation_name(model: EvalModel, classifier: Tensor, data: LabelledData) -> str:
    """Equal only where every image would be given the same classes."""
    digest = hashlib.sha256(classifier.cpu().numpy().tobytes())
    digest.update(f"{model.fingerprint} {model.image_size} {data.fingerprint}".encode())
    return digest.hexdigest()[:16]


def _write(
    out: Path,
    result: ZeroShotResult,
    data: LabelledData,
    model: EvalModel,
    num_templates: int,
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
        "num_templates": num_templates,
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
        "findings": data.findings.describe(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    title = f"Zero-shot classification of {classes.name}"
    write_results(
        out,
        command=("zero-shot", *arguments),
        title=title,
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
        f"{numbers['num_classes']} classes, {numbers['num_templates']} templates; "
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

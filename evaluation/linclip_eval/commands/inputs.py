"""Command-line arguments that several evaluations share, and what they open."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ds_linclip.inference import PRECISIONS, LoadedModel, load_model
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS, NamePolicy
from linclip_eval.zero_shot.evaluate import ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = [
    "add_data_arguments",
    "add_model_arguments",
    "add_precision_argument",
    "add_task_arguments",
    "all_ranks",
    "data_options",
    "model_from_arguments",
    "parse_sources",
    "score_task",
]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, --precision and --image-size to a command line."""
    parser.add_argument(
        "model",
        help="run folder, checkpoint, hub folder of ds-linclip or open_clip, or open_clip's "
        "NAME[:TAG]; a NAME alone has random weights",
    )
    add_precision_argument(parser)
    parser.add_argument(
        "--image-size", type=int, help="side in pixels; default: the size the model was trained on"
    )


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --precision."""
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="of weights and images; default: fp32",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --batch-size, --num-workers and --lenient, which say how images are read."""
    parser.add_argument(
        "--batch-size", type=int, default=256, help="images per forward and process; default: 256"
    )
    parser.add_argument(
        "--num-workers", type=int, default=2, help="decoding processes per process; default: 2"
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="count what is wrong with the folder (unknown or empty classes, images that cannot be "
        "read or have no caption) instead of ending with an error; such images count as wrong",
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --classes, --names and --templates, and those of :func:`add_data_arguments`."""
    parser.add_argument(
        "--classes",
        help=f"{', '.join(IMAGENET_LISTS)}, or a file with one synset per line; without it the "
        "data must be in clip_benchmark's layout, which names classes and templates",
    )
    parser.add_argument(
        "--names",
        choices=get_args(NamePolicy),
        help="the names of the classes in prompts; default: lemma",
    )
    parser.add_argument(
        "--templates",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with one "
        "template per line; default: one",
    )
    add_data_arguments(parser)


def parse_sources(arguments: Sequence[str], name: str) -> dict[str, str]:
    """Return sources by label from arguments ``LABEL=SOURCE`` or ``SOURCE``.

    Without a label, the last part of a path is it.

    Raises:
        ValueError: when a label is repeated, naming the argument ``name``.
    """
    sources: dict[str, str] = {}
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or Path(argument).exists():
            label, source = Path(argument).name, argument
        if label in sources:
            raise ValueError(f"{name} ({' '.join(arguments)}) must have different labels")
        sources[label] = source
    return sources


@contextmanager
def all_ranks() -> Iterator[Mesh]:
    """Yield the mesh of all processes; end its groups after all of them left the context."""
    mesh = Mesh.create()
    yield mesh
    mesh.barrier()
    mesh.close()


def model_from_arguments(options: argparse.Namespace, mesh: Mesh) -> LoadedModel:
    """Load the model that :func:`add_model_arguments` describes; see :func:`load_model`."""
    return load_model(
        options.model, mesh, precision=options.precision, image_size=options.image_size
    )


def data_options(options: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """Return the arguments of :class:`~ds_linclip.data.LabelledData` that a command line and a
    model give; see :func:`add_data_arguments`."""
    return {
        "transform": model.transform,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "strict": not options.lenient,
    }


def score_task(
    options: argparse.Namespace, folder: str, model: LoadedModel, mesh: Mesh, out: Path
) -> tuple[ZeroShotTask, ZeroShotResult]:
    """Open the task that :func:`add_task_arguments` describes and score a model on it.

    ``out``, the folder of results, also keeps finished parts.

    Raises:
        ValueError: on all ranks, when the task cannot be opened or scored.
    """
    open_task = partial(
        ZeroShotTask.open,
        folder,
        classes=options.classes,
        names=options.names or "lemma",
        templates=options.templates or "one",
        **data_options(options, model),
    )
    task = mesh.agree(open_task, (ValueError, OSError))
    result = task.score(
        model,
        tokenizer=model.tokenizer,
        device=model.device,
        group=mesh.dp.group,
        cache_dir=out,
        fingerprint=model.fingerprint,
    )
    return task, result

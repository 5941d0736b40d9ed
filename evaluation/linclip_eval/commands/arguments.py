"""Command-line arguments that several evaluations share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ds_linclip.inference import PRECISIONS, EvalModel, load_model
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS, NamePolicy
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = [
    "add_model_arguments",
    "add_precision_argument",
    "add_reading_arguments",
    "add_task_arguments",
    "labelled",
    "model_from_arguments",
    "task_from_arguments",
]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, --precision and --image-size to a command line."""
    parser.add_argument(
        "model",
        help="run folder, checkpoint, open_clip hub folder, or NAME[:TAG] of open_clip; a NAME "
        "alone has random weights",
    )
    add_precision_argument(parser)
    parser.add_argument(
        "--image-size", type=int, help="side in pixels; default: what the model was trained with"
    )


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --precision, of weights and images."""
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how images are read: --batch-size, --num-workers and --lenient."""
    parser.add_argument("--batch-size", type=int, default=256, help="images, per process")
    parser.add_argument("--num-workers", type=int, default=2, help="decoding, per process")
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="go on in spite of what is wrong with the folder (unknown or empty classes, images "
        "that cannot be read or have no caption); it is counted, and such images count as wrong",
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --classes, --names and --templates, and those of :func:`add_reading_arguments`."""
    parser.add_argument(
        "--classes",
        help=f"{', '.join(IMAGENET_LISTS)}, or a file with a synset a line; without it the data "
        "must be in clip_benchmark's layout and name their classes and templates",
    )
    parser.add_argument("--names", choices=get_args(NamePolicy), help="default: lemma")
    parser.add_argument(
        "--templates",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with a "
        "template a line; default: one",
    )
    add_reading_arguments(parser)


def labelled(arguments: Sequence[str], what: str) -> dict[str, str]:
    """Sources by label, of ``LABEL=SOURCE``; a source alone is labelled with its last part.

    Args:
        arguments: Of the command line.
        what: They are, for messages.

    Raises:
        ValueError: when a label comes twice.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or Path(argument).exists():
            label, source = Path(argument).name, argument
        if label in found:
            raise ValueError(f"{what} ({' '.join(arguments)}) must have different labels")
        found[label] = source
    return found


def model_from_arguments(arguments: argparse.Namespace, mesh: Mesh) -> EvalModel:
    """The model that :func:`add_model_arguments` asked for.

    Raises:
        ValueError: as :func:`load_model`.
    """
    return load_model(
        arguments.model, mesh, precision=arguments.precision, image_size=arguments.image_size
    )


def task_from_arguments(
    arguments: argparse.Namespace, folder: str | Path, model: EvalModel
) -> ZeroShotTask:
    """Open the task of a folder as :func:`add_task_arguments` asked for it.

    Raises:
        ValueError: as :meth:`ZeroShotTask.open`.
    """
    return ZeroShotTask.open(
        folder,
        transform=model.transform,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        classes=arguments.classes,
        names=arguments.names or "lemma",
        templates=arguments.templates or "one",
        strict=not arguments.lenient,
    )

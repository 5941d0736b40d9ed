"""What several commands ask for on their command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_linclip.inference import PRECISIONS, EvalModel, load_model
from ds_linclip.parallel.mesh import Mesh

__all__ = [
    "add_model_arguments",
    "add_precision_argument",
    "add_reading_arguments",
    "labelled",
    "model_from_arguments",
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

"""What several evaluations open: models, data and tasks, from the arguments of a command."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ds_linclip.inference import LoadedModel, load_model
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.zero_shot.evaluate import ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = [
    "all_ranks",
    "check_out",
    "data_options",
    "model_from_arguments",
    "parse_sources",
    "score_task",
]


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
        sources[label] = os.path.expanduser(source)
    return sources


def check_out(out: Path) -> None:
    """Check that results can be written, before there are any.

    Raises:
        ValueError: when ``out`` is no folder, or cannot be made or written.
    """
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "cannot be written" if place.is_dir() else "is not a folder"
        raise ValueError(f"--out ({out}) must be a folder that can be written; {place} {found}")


@contextmanager
def all_ranks() -> Iterator[Mesh]:
    """Yield the mesh of all processes; end its groups after all of them left the context."""
    mesh = Mesh.create()
    yield mesh
    mesh.barrier()
    mesh.close()


def model_from_arguments(options: argparse.Namespace, mesh: Mesh) -> LoadedModel:
    """Load the model of MODEL, --precision and --image-size; see :func:`load_model`."""
    return load_model(
        options.model, mesh, precision=options.precision, image_size=options.image_size
    )


def data_options(options: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """Return the arguments of :class:`~ds_linclip.data.LabelledData` that a command line and a
    model give: --batch-size, --num-workers, --lenient and --max-bad-samples."""
    return {
        "transform": model.transform,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "strict": not options.lenient,
        "max_bad_samples": options.max_bad_samples or 0,
    }


def score_task(
    options: argparse.Namespace, folder: str, model: LoadedModel, mesh: Mesh, out: Path
) -> tuple[ZeroShotTask, ZeroShotResult]:
    """Open the task that --classes, --names and --templates describe, and score a model on it.

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

"""The results that the commands write, and sentences that their summaries share."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ds_linclip.data import UnreadableImage, describe_unreadable
from ds_linclip.inference import LoadedModel
from ds_linclip.provenance import run_facts
from linclip_eval.results import write_report
from linclip_eval.zero_shot.evaluate import ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = [
    "bullets",
    "command_facts",
    "describe",
    "model_facts",
    "publish",
    "remarks",
    "unreadable_entries",
    "zero_shot_remarks",
]

_MEASURED = ("ds_linclip", "kernels/linclip_kernels", "evaluation")


def command_facts(words: Sequence[str], device: str) -> dict[str, str]:
    """Return :func:`~ds_linclip.provenance.run_facts` of a command line of linclip."""
    line = shlex.join(["linclip", *words])
    return run_facts(device, line, measured=_MEASURED, packages=("torch", "open_clip_torch"))


def publish(
    out: Path,
    words: Sequence[str],
    device: torch.device,
    *,
    title: str,
    sections: Sequence[str],
    tables: Mapping[str, Sequence[Any]],
    numbers: Mapping[str, Any],
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Write the results of a command by :func:`~linclip_eval.results.write_report`, tables with
    every digit, and print the summary.

    Args:
        out: The folder of results.
        words: The command line of linclip.
        device: The device that made the measurements.
        title, sections, tables, numbers, figures: Arguments of ``write_report``.
    """
    summary = write_report(
        out,
        title=title,
        sections=sections,
        facts=command_facts(words, device.type),
        tables=tables,
        float_format="",
        figures=figures,
        numbers=numbers,
    )
    print(summary)


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return the entries of ``results.json`` that identify a model."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "image_size": list(model.image_size),
    }


def describe(model: LoadedModel) -> str:
    """Return a model's name and image size in Markdown."""
    height, width = model.image_size
    return f"`{model.name}` at {height} x {width} px"


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list; empty when there are no lines."""
    return "\n".join(f"- {line}" for line in lines)


def zero_shot_remarks(task: ZeroShotTask, result: ZeroShotResult) -> list[str]:
    """Return a line for each defect of the images, found when they were opened or read."""
    unreadable = {"unreadable images, which count as wrong": describe_unreadable(result.unreadable)}
    return [*task.data.findings.describe(), *remarks(unreadable)]


def unreadable_entries(images: Sequence[UnreadableImage]) -> list[dict[str, str]]:
    """Return the entries of ``results.json`` that name images which cannot be read."""
    return [{"key": each.key, "reason": each.cause, "where": each.where} for each in images]


def remarks(found: Mapping[str, object]) -> list[str]:
    """Return a line for each remark, its text and its value, except those without a value."""
    return [f"{text}: {value}" for text, value in found.items() if value]

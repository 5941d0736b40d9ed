"""The files that the commands write, and sentences that their summaries share."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_linclip.inference import LoadedModel
from linclip_eval.results import wilson_interval, write_results

__all__ = [
    "bullets",
    "describe",
    "describe_unreadable",
    "model_facts",
    "publish",
    "share_interval",
    "write_csv",
]


def publish(
    out: Path,
    *,
    command: Sequence[str],
    title: str,
    paragraphs: Iterable[str],
    numbers: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Write ``results.json`` and ``summary.md`` as :func:`write_results`, and print the summary.

    Args:
        out: The folder of results.
        command: The subcommand and its arguments.
        title: The heading of the summary.
        paragraphs: The body of the summary, in Markdown; empty ones are left out.
        numbers: The measurements.
        device: The device that made them.
    """
    write_results(
        out,
        command=command,
        title=title,
        body="\n\n".join(paragraph for paragraph in paragraphs if paragraph),
        numbers=numbers,
        device=device,
    )
    print((out / "summary.md").read_text(encoding="utf-8"))


def write_csv(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Write a table with a header line; its folder is created when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


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


def share_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``trials``."""
    return wilson_interval(round(share * trials), trials)


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list; empty when there are no lines."""
    return "\n".join(f"- {line}" for line in lines)


def describe_unreadable(images: str, unreadable: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line with the number and the first of some unreadable images, if there are any."""
    if not unreadable:
        return []
    key, reason = unreadable[0]
    return [f"{images}: {len(unreadable)} ({key}: {reason}, ...)"]

"""What an evaluation leaves behind: numbers for programs, a summary for people."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from ds_linclip.provenance import commit_of, device_name

__all__ = ["markdown_table", "percent", "wilson_interval", "write_results"]

#: Characters that Markdown gives a meaning inside a line.
_MARKUP = re.compile(r"([\\|*_\[\]`])")
_LIBRARIES = ("torch", "open_clip_torch")


def write_results(
    folder: Path,
    *,
    command: Sequence[str],
    title: str,
    body: str,
    numbers: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Write ``results.json`` and ``summary.md``, with where, when and by what they were made.

    Args:
        folder: Made when it is not there.
        command: The subcommand of linclip-eval and its arguments.
        title: Heading of the summary.
        body: The rest of it, Markdown.
        numbers: What was measured, as JSON has it.
        device: On which.
    """
    facts = {
        "device": device_name(device.type),
        **{name: version(name) for name in _LIBRARIES},
        "commit": commit_of(["ds_linclip", "kernels/linclip_kernels", "evaluation"]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["linclip-eval", *command]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": title, **facts, **numbers}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    libraries = ", ".join(f"{name} {facts[name]}" for name in _LIBRARIES)
    made = (
        f"{facts['device']}, {libraries}, commit {facts['commit']}, {facts['date']}: "
        f"`{facts['command']}`"
    )
    summary = f"# {title}\n\n{body.strip()}\n\n{made}\n"
    (folder / "summary.md").write_text(summary, encoding="utf-8")


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = ""
) -> str:
    """A Markdown table.

    Args:
        header: Titles of the columns.
        rows: As many cells each.
        align: "l" or "r" for each column; by default the first to the left, the others right.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [header, [{"l": ":---", "r": "---:"}[side] for side in align], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def percent(share: float, trials: int | None = None) -> str:
    """A share in per cent; with the number of trials behind it, also its 95 % interval."""
    if trials is None:
        return f"{100 * share:.2f}"
    low, high = wilson_interval(round(share * trials), trials)
    return f"{100 * share:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _cell(value: object) -> str:
    """Names of classes and captions come from anywhere: no mark-up in them."""
    return _MARKUP.sub(r"\\\1", " ".join(str(value).split()))

"""Where and on what a benchmark has run: device, commit, and the folder of its results."""

import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["commit_of", "device_name", "folder_name"]

ROOT = Path(__file__).parents[2]


def device_name(device: str) -> str:
    """The chip behind "cuda" or "cpu"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.machine()}"


def folder_name(name: str) -> str:
    """A device's name as that of a folder."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_of(measured: Sequence[str]) -> str:
    """The commit of the checkout, marked where what is measured differs from it.

    Args:
        measured: Paths from the root of the repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", *measured) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

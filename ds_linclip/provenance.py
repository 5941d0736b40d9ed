"""The origin of a result: device, versions, date, commit, command."""

import hashlib
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = [
    "commit_of",
    "device_name",
    "folder_name",
    "package_version",
    "run_facts",
    "software",
]

_PACKAGES = (
    *("torch", "triton", "deepspeed", "megatron-core", "open_clip_torch", "webdataset", "numpy"),
)
_OURS = ("ds_linclip", "linclip_kernels", "linclip_eval", "linclip_launch")


def device_name(device: str) -> str:
    """Return the name of the chip behind "cuda" or "cpu"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.machine()}"


def folder_name(name: str) -> str:
    """Return a device's name in lower case with hyphens, as the name of a folder."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_of(measured: Sequence[str]) -> str:
    """Return the short commit of the checkout that this package runs from, or "unknown".

    Args:
        measured: Paths from the root of the repository; "-dirty" is added to the commit where one
            of them differs from it.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", *(f":/{path}" for path in measured))
    return f"{commit}-dirty" if changed else commit


def run_facts(
    device: str, command: str, *, measured: Sequence[str], packages: Sequence[str] = ("torch",)
) -> dict[str, str]:
    """Return what a reader needs to make a result again: device, versions, date, commit, command.

    Args:
        device: "cuda" or "cpu".
        command: The command line that made the result.
        measured: Paths from the root of the repository that the result depends on; see
            :func:`commit_of`.
        packages: Distributions whose versions matter.
    """
    return {
        "device": device_name(device),
        **{name: package_version(name) or "not installed" for name in packages},
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit_of(measured),
        "command": command,
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def software(device: torch.device) -> dict[str, str | None]:
    """Return the version of everything that results depend on, by name; None where it is absent.

    ``git_commit`` is that of the checkout this package runs from, with ``-dirty`` where files were
    changed. ``source`` is a hash of all modules of the project. ``cuda`` (torch's), ``nccl`` and
    ``driver`` (NVIDIA's) are set on a GPU only.
    """
    on_gpu = device.type == "cuda"
    nccl = torch.cuda.nccl.version() if on_gpu else None
    return {
        "git_commit": _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
        "source": _source(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("ds_linclip", *_PACKAGES)},
        "cuda": torch.version.cuda if on_gpu else None,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "driver": _driver() if on_gpu else None,
    }


def _git(*arguments: str) -> str | None:
    """Return the output of git; None unless git tracks this file, since an installed copy may lie
    within another repository."""
    here, found = Path(__file__), ""
    for words in (("ls-files", "--error-unmatch", here.name), arguments):
        try:
            found = subprocess.check_output(
                ["git", *words], cwd=here.parent, stderr=subprocess.DEVNULL, text=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
    return found.strip()


def _source() -> str:
    digest = hashlib.sha256()
    for package in _OURS:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{path.relative_to(folder)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    content = path.read_text() if path.exists() else ""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", content)
    return found[1] if found else None

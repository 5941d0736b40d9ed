"""What software runs here: facts that results depend on, and that all nodes must agree on."""

import hashlib
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["software"]

_PACKAGES = (
    *("torch", "triton", "deepspeed", "megatron-core", "open_clip_torch", "webdataset", "numpy"),
)
_OURS = ("ds_linclip", "linclip_kernels", "linclip_eval")


def software(device: torch.device) -> dict[str, str | None]:
    """Versions by name; None: not there.

    ``git_commit`` is that of the checkout this package runs from; ``-dirty`` behind it: with
    changes of its own. ``source`` is a hash of all our modules, whatever git says of them. ``cuda``
    (of torch), ``nccl`` and ``driver`` (NVIDIA's) are those of a GPU.
    """
    on_gpu = device.type == "cuda"
    nccl = torch.cuda.nccl.version() if on_gpu else None
    return {
        "git_commit": _git_commit(),
        "source": _source(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("ds_linclip", *_PACKAGES)},
        "cuda": torch.version.cuda if on_gpu else None,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "driver": _driver() if on_gpu else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__)
    if _git("ls-files", "--error-unmatch", here.name) is None:
        return None  # an installed copy, perhaps within some other repository
    return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
    with suppress(OSError):
        found = re.search(
            r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text()
        )
        return found[1] if found else None
    return None

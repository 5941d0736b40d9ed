"""``linclip doctor``: what a bug report must say about a machine, in one table."""

import argparse
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ds_linclip.provenance import device_name, package_version

__all__ = ["run"]

_PACKAGES = (
    *("ds_linclip", "torch", "torchvision", "triton", "deepspeed", "megatron-core"),
    *("open_clip_torch", "webdataset", "omegaconf", "numpy", "pyarrow", "fsspec"),
)
#: Variables that change what ranks do begin with these.
_VARIABLES = (
    "CUDA_",
    "DS_",
    "FI_",
    "GLOO_",
    "LINCLIP_",
    "MASTER_",
    "NCCL_",
    "OMP_",
    "TORCH_",
    "TRITON_",
)
_DRIVER = Path("/proc/driver/nvidia/version")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    del options
    rows = list(_rows())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _rows() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in _PACKAGES:
        yield name, package_version(name) or "not installed"
    yield "cpu", f"{device_name('cpu')}, {len(os.sched_getaffinity(0))} cores usable"
    yield "memory", _of(psutil.virtual_memory().available, psutil.virtual_memory().total)
    yield "driver", _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else "no NVIDIA driver"
    yield "cuda of torch", f"{torch.version.cuda}"
    yield from _gpus()
    for name, folder in (("shared memory", "/dev/shm"), ("this folder", "."), ("/tmp", "/tmp")):
        usage = shutil.disk_usage(folder)
        yield name, _of(usage.free, usage.total)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield "limits", f"{files} open files, {_limit(locked)} locked memory"
    yield "compiler", shutil.which("gcc") or shutil.which("cc") or "none: Triton needs one"
    yield "port 29500", _port(29500)
    interfaces = sorted(psutil.net_if_addrs())
    yield "interfaces", f"{socket.gethostname()}: {', '.join(interfaces)}"
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield name, os.environ[name]


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        reason = ""
        if _DRIVER.exists():
            try:
                torch.cuda.init()
            except RuntimeError as error:
                reason = f": {str(error).splitlines()[0]}"
        yield "gpus", f"none usable{reason}"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"gpu {index}", f"{found.name}, {memory}, capability {found.major}.{found.minor}"
    yield "nccl", ".".join(map(str, torch.cuda.nccl.version()))


def _of(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _limit(size: int) -> str:
    return "unlimited" if size == resource.RLIM_INFINITY else f"{size // 1024} KiB of"


def _port(number: int) -> str:
    try:
        socket.create_server(("", number)).close()
    except OSError as error:
        return f"taken ({error.strerror})"
    return "free"

"""Checks of what each node has: the config, software, devices, disk space."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from ds_linclip.config import Config, check_batch, check_ranks, load_config
from ds_linclip.model.flops import num_parameters, num_state_values
from ds_linclip.parallel.mesh import select_device
from ds_linclip.planner.memory_model import value_bytes
from ds_linclip.preflight.rendezvous import Rendezvous
from ds_linclip.preflight.table import CheckResult, Problem, problems_if
from ds_linclip.preflight.verdicts import differences, format_gib, format_range, grouped, plural
from ds_linclip.provenance import software

__all__ = [
    "DiskSpace",
    "Node",
    "check_config",
    "check_disk_space",
    "check_layout",
    "check_nodes",
    "checkpoint_size",
    "disk_space",
]

_OWN_ROWS = ("python", "torch", "deepspeed", "megatron-core")
_OF_PROJECT = ("ds_linclip", "git_commit", "source")
_OF_GPU = ("cuda", "nccl", "driver")
_COMMIT = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")
_REMEDIES = {
    "checkpoints": "free it, lower checkpoint.keep_last, or choose another output_dir",
    "cache": "free it, lower data.cache.max_gib, or choose another data.cache.dir",
    "/dev/shm": "start the container with --shm-size=1g or more",
}


def check_config(
    rendezvous: Rendezvous, path: str, overrides: Sequence[str]
) -> tuple[CheckResult, Config | None]:
    """Load the config on every rank and compare a digest of its resolved values.

    Returns:
        The row, and this rank's config; None if it cannot be loaded.
    """
    loaded: list[Config] = []

    def digest() -> str:
        loaded.append(load_config(path, overrides))
        content = json.dumps(asdict(loaded[0]), default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    results = rendezvous.gather("config", digest)
    problems = problems_if(
        results.failures() + differences(results.by_host(_joined), "resolved config"),
        "the config must be there, valid, and the same on every host",
        "fix the config, or bring the same files to every host",
    )
    found = path if problems else f"{path}, the same on all ranks"
    return CheckResult(check="config", found=found, problems=problems), next(iter(loaded), None)


def check_layout(hosts: Sequence[str], config: Config) -> CheckResult:
    """Check that the ranks, of which ``hosts`` are the hosts, fit the axes and the batch."""
    parallel, batch, world_size = config.parallel, config.train.global_batch_size, len(hosts)
    try:
        dp_size = check_ranks(parallel, world_size)
        check_batch(config, dp_size)
    except ValueError as error:
        found, remedy = f"{world_size} ranks", "start another number, or change these settings"
        problems = problems_if([("all hosts", found)], str(error), remedy)
        return CheckResult(check="ranks", found=found, problems=problems)
    per_host = dict(Counter(hosts))  # asdict cannot copy a Counter
    found = f"{plural(world_size, 'rank')} on {plural(len(per_host), 'host')}"
    if len(per_host) > 1:
        found += f", on each: {grouped({host: str(n) for host, n in per_host.items()})}"
    found += f"; tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {dp_size}, "
    found += f"{batch // dp_size} pairs of {batch} each"
    figures = {"ranks": world_size, "dp": dp_size, "per_host": per_host}
    return CheckResult(check="ranks", found=found, figures=figures)


class Node(TypedDict):
    """The findings of one rank on its host.

    Attributes:
        software: Versions by name, see :func:`~ds_linclip.provenance.software`.
        device: The device of this rank.
        devices: The GPUs of this host with their memory; empty for ranks on the CPU.
        num_cores: The CPU cores that this rank may use.
        memory: Bytes of the host.
    """

    software: Mapping[str, str | None]
    device: str
    devices: Sequence[str]
    num_cores: int
    memory: int


def check_nodes(rendezvous: Rendezvous, config: Config) -> tuple[list[CheckResult], bool]:
    """Compare software and devices of all ranks.

    Returns:
        The rows, and whether the ranks can communicate: all have a device, of one type.
    """
    results = rendezvous.gather("node", partial(_describe_node, config))
    problems = problems_if(
        results.failures(),
        "every rank must find its device and the versions of its software",
        "start fewer ranks there, or repair it",
    )
    if problems:
        return [CheckResult(check="devices", problems=problems)], False
    nodes: Mapping[str, Sequence[Node]] = results.by_host(list)
    devices, can_communicate = _compare_devices(nodes)
    return [*_compare_software(nodes), devices], can_communicate


def _describe_node(config: Config) -> Node:
    """Raises ValueError when this host has fewer GPUs than ranks."""
    device = select_device(config.parallel)
    gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    properties = [torch.cuda.get_device_properties(gpu) for gpu in gpus]
    return {
        "software": software(device),
        "device": str(device),
        "devices": [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in properties],
        "num_cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _compare_software(nodes: Mapping[str, Sequence[Node]]) -> Iterator[CheckResult]:
    apart = (*_OWN_ROWS, *_OF_PROJECT, *_OF_GPU)
    others = [name for name in next(iter(nodes.values()))[0]["software"] if name not in apart]
    rows: dict[str, Sequence[str]] = {name: [name] for name in _OWN_ROWS}
    rows |= {"ds_linclip": _OF_PROJECT, "other packages": others, "GPU software": _OF_GPU}
    for check, packages in rows.items():
        texts, problems = [], list[Problem]()
        for name in packages:
            versions = {
                host: _joined(each["software"][name] or "none" for each in of_host)
                for host, of_host in nodes.items()
            }
            if set(versions.values()) == {"none"} and len(packages) > 1:
                continue
            text = grouped({host: _COMMIT.sub(r"\1", each) for host, each in versions.items()})
            texts.append(text if name == check else f"{name} {text}")
            remedy = "install the versions of constraints.txt, check out the same commit"
            problems += problems_if(
                differences(versions, name),
                f"{name} must be the same on all hosts",
                "give the hosts the same image" if name in _OF_GPU else remedy,
                is_warning=name == "driver",
            )
        if texts:
            yield CheckResult(check=check, found=", ".join(texts), problems=problems)


def _compare_devices(nodes: Mapping[str, Sequence[Node]]) -> tuple[CheckResult, bool]:
    """Return the row, and whether all ranks are on one type of device."""
    types, names, texts = {}, {}, {}
    for host, of_host in nodes.items():
        first = of_host[0]
        types[host] = _joined(torch.device(each["device"]).type for each in of_host)
        names[host] = _joined(", ".join(dict.fromkeys(each["devices"])) for each in of_host)
        device = f"{len(first['devices'])} x {names[host]}" if first["devices"] else "CPU"
        texts[host] = f"{plural(len(of_host), 'rank')}, {device}, {first['num_cores']} cores, "
        texts[host] += f"{first['memory'] / 2**30:.0f} GiB"
    problems = problems_if(
        differences(types, "ranks on"),
        "all ranks must be on one type of device",
        "see parallel.device, DS_ACCELERATOR",
    )
    is_one_type = not problems
    problems += problems_if(
        differences(names, "devices"),
        "equal devices: all ranks wait for the slowest, and the smallest is filled",
        "leave those hosts out",
        is_warning=True,
    )
    figures = {host: of_host[0] for host, of_host in nodes.items()}
    row = CheckResult(check="devices", found=grouped(texts), problems=problems, figures=figures)
    return row, is_one_type


class DiskSpace(TypedDict):
    """The room on a disk: the folder, or the nearest existing one above it, bytes that are free,
    bytes that the run needs, and how these are computed."""

    path: str
    free: int
    needed: int
    reason: str


def check_disk_space(
    rendezvous: Rendezvous, config: Config, min_free_bytes: float
) -> Iterator[CheckResult]:
    """Yield a row for each purpose of :func:`disk_space`; one rank of each host looks.

    At least ``min_free_bytes`` must be free for checkpoints and for the cache, whatever they need.
    """
    results = rendezvous.gather("disk", partial(disk_space, config), rendezvous.leaders)
    problems = problems_if(
        results.failures(), "folders must be readable", "check their permissions"
    )
    if problems:
        yield CheckResult(check="disk", problems=problems)
        return
    by_host: Mapping[str, Mapping[str, DiskSpace]] = results.by_host(lambda spaces: spaces[0])
    for purpose in by_host[rendezvous.hosts[0]]:
        spaces = {host: of_host[purpose] for host, of_host in by_host.items()}
        limit = 0.0 if purpose == "/dev/shm" else min_free_bytes
        short = []
        for host, space in spaces.items():
            if space["free"] < max(space["needed"], limit):
                needed = f"{format_gib(space['needed'])} needed: {space['reason']}"
                if space["needed"] < limit:
                    needed = f"{format_gib(limit)} needed: --min-free-gib"
                short.append(
                    (host, f"{format_gib(space['free'])} free in {space['path']}, {needed}")
                )
        problems = problems_if(
            short,
            f"{purpose} must have room",
            _REMEDIES[purpose],
            is_warning=purpose != "checkpoints"
            and all(space["free"] >= limit for space in spaces.values()),
        )
        free = format_range({host: space["free"] / 2**30 for host, space in spaces.items()})
        most = max(space["needed"] for space in spaces.values())
        found = f"{free} GiB free, {format_gib(most)} needed"
        yield CheckResult(check=f"disk: {purpose}", found=found, problems=problems, figures=spaces)


def disk_space(config: Config) -> dict[str, DiskSpace]:
    """Return the room for "checkpoints", for the "cache" if the config has one, in "/dev/shm"."""
    checkpoint = checkpoint_size(config)
    count = _max_num_checkpoints(config)
    existing = _bytes_below(config.run_dir / "checkpoints")
    reason = f"{count} checkpoints of {checkpoint / 2**30:.3g} GiB"
    if existing:
        reason += f" less the existing {existing / 2**30:.3g} GiB"
    spaces = {"checkpoints": _disk_space(config.run_dir, count * checkpoint - existing, reason)}
    cache = config.data.cache
    if cache.dir is not None:
        path = Path(cache.dir)
        needed = int(cache.max_gib * 2**30) - _bytes_below(path)
        reason = f"data.cache.max_gib ({cache.max_gib:g}) less existing copies"
        spaces["cache"] = _disk_space(path, needed, reason)
    reason = "the minimum for DeepSpeed and NCCL; data workers pass batches through it"
    spaces["/dev/shm"] = _disk_space(Path("/dev/shm"), 2**29, reason)
    return spaces


def checkpoint_size(config: Config) -> int:
    """Return the bytes of a checkpoint; with frozen towers, a lower bound."""
    is_locked = config.init.lock_image or config.init.lock_text
    per_parameter = value_bytes(config) if is_locked else 4 * num_state_values(config.optim)
    return per_parameter * num_parameters(config.model, config.loss)


def _max_num_checkpoints(config: Config) -> int:
    """Return the number of those kept for a while, the one being written, those kept permanently,
    or of all saves if these are fewer; of a run in epochs, whose steps are not known, without those
    kept permanently."""
    steps, checkpoint = config.train.steps, config.checkpoint
    if config.train.epochs is not None:
        return checkpoint.keep_last + 1
    saves = steps if checkpoint.every_minutes else 1
    if checkpoint.every_steps:
        saves = max(saves, -(-steps // checkpoint.every_steps))
    permanent = steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    return min(saves, checkpoint.keep_last + 1 + permanent)


def _disk_space(path: Path, needed: int, reason: str) -> DiskSpace:
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    return {"path": str(existing), "free": free, "needed": max(0, needed), "reason": reason}


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run at work removes old ones
            found += path.stat().st_size if path.is_file() else 0
    return found


def _joined(values: Iterable[str]) -> str:
    """Return the value of all ranks of a host; all of them where they differ."""
    return " and ".join(dict.fromkeys(values))

"""The lock file and the compose file of docker/, checked without building anything."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import REPOSITORY

DOCKER = REPOSITORY / "docker"
#: Environment markers of the image.
IMAGE = {"python_version": "3.11", "python_full_version": "3.11.2", "sys_platform": "linux"}


def pins(path: Path) -> dict[str, str]:
    """Return the pinned version of every package."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in found}


def needed() -> dict[str, list[Requirement]]:
    """Return the requirements of the project with its extras eval and s3, direct and indirect."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    todo = [*project["dependencies"], *extras["eval"], *extras["s3"]]
    found: dict[str, list[Requirement]] = {}
    seen = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = str(canonicalize_name(requirement.name))
        environments = [{**IMAGE, "extra": extra} for extra in requirement.extras or {""}]
        if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
            continue
        found.setdefault(name, []).append(requirement)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        for text in requires(name) or []:
            below = Requirement(text)
            if below.marker is None or any(map(below.marker.evaluate, environments)):
                below.marker = None
                todo.append(str(below))
    return found


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11")
def test_lock_file_holds_what_pyproject_needs_in_the_versions_of_constraints():
    locked, constraints = pins(DOCKER / "requirements.lock"), pins(REPOSITORY / "constraints.txt")
    wanted = needed()
    assert locked.keys() == wanted.keys(), "call make lock"
    for name, version in locked.items():
        for requirement in wanted[name]:
            assert requirement.specifier.contains(version, prereleases=True), requirement
        if name != "setuptools":  # pip freeze leaves it out
            assert version == constraints[name], f"{name}: call make lock"
    assert pins(DOCKER / "build.lock") == {"setuptools": locked["setuptools"]}


def services(*files: str) -> dict:
    """Return the merged services of compose files."""
    options = [option for file in files for option in ("--file", str(DOCKER / file))]
    shown = subprocess.run(
        [Path(sys.executable).with_name("podman-compose"), "--dry-run", *options, "config"],
        env={"TRAIN": "ds_configs/train/vit_b16.yaml name=mine"},
        capture_output=True,
        text=True,
        check=True,
    )
    return yaml.safe_load(shown.stdout)["services"]


def test_compose_starts_the_launch_script_on_the_nodes_of_the_hostfile():
    hosts = [line.split() for line in (DOCKER / "hostfile").read_text().splitlines()]
    on_cpu, on_gpu = services("compose.yaml"), services("compose.yaml", "compose.gpu.yaml")
    assert on_cpu.keys() == on_gpu.keys() == {*(host for host, _ in hosts), "tensorboard"}
    gpus = []
    for host, slots in hosts:
        assert on_cpu[host]["hostname"] == host
        assert on_cpu[host]["environment"]["DS_ACCELERATOR"] == "cpu"
        assert on_gpu[host]["environment"]["DS_ACCELERATOR"] == "cuda"
        assert on_gpu[host]["command"] == on_cpu[host]["command"]
        (device,) = on_gpu[host]["deploy"]["resources"]["reservations"]["devices"]
        assert slots == f"slots={len(device['device_ids'])}"
        gpus += device["device_ids"]
    assert len(gpus) == len(set(gpus)), "NCCL takes a GPU for one rank only"
    # Here the launch script finds its config, and no hostfile.
    node = on_cpu["node1"]
    started = subprocess.run(
        node["command"],
        env={**os.environ, **node["environment"], "HOSTNAME": "node1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 2
    assert "hostfile (/run/hostfile) cannot be read" in started.stderr
    assert "./hostfile:/run/hostfile:ro" in node["volumes"]

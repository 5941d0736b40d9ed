"""The wheel, installed away from any checkout, trains."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from helpers import REPOSITORY

pytestmark = pytest.mark.distributed
SOURCES = ["ds_configs", "ds_linclip", "evaluation", "kernels", "launch"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; the packages that it needs are those of this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, source / name, symlinks=False)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
    packages = next((place / "env" / "lib").iterdir()) / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = place.glob("*.whl")
    python = place / "env" / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    return place / "env"


def linclip(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [environment / "bin" / "linclip", *words],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_packaged_config_trains_and_is_scored_in_any_folder(environment, tmp_path):
    folder = tmp_path / "mes données"
    folder.mkdir()
    short = ["train.steps=4", "optim.warmup_steps=1", "train.global_batch_size=16"]
    done = linclip(environment, folder, "train", "embedded", *short, "eval.every_steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data/embedded is missing: writing it" in done.stderr
    assert f"run folder:  {folder}/runs/embedded" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["data", "runs"]
    scored = linclip(environment, folder, "eval", "zero-shot", "runs/embedded")
    assert scored.returncode == 0, scored.stderr
    assert "360 images of 10 of 10 classes" in scored.stdout
    table = linclip(environment, folder, "runs")
    assert "finished" in table.stdout


def test_installed_packages_are_those_of_the_wheel(environment, tmp_path):
    code = (
        "import ds_linclip, linclip_launch, linclip_eval, linclip_kernels as k; print(k.__file__)"
    )
    where = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)


def test_kernels_install_alone(environment, tmp_path):
    """The operator's own wheel holds the operator, and nothing else."""
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "kernels", symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, tmp_path / "kernels"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"linclip_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    versions = {
        tomllib.loads((REPOSITORY / place / "pyproject.toml").read_text())["project"]["version"]
        for place in (".", "kernels")
    }
    assert len(versions) == 1
    code = "from linclip_kernels import linear_attention; import torch; "
    code += "x = torch.randn(1, 5, 2, 16); print(tuple(linear_attention(x, x, x).shape))"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(1, 5, 2, 16)", done.stderr

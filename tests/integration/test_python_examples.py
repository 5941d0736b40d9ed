"""The Python examples of README and docs/api.md run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_linclip.config import load_config
from ds_linclip.data.prepare.digits import digit_samples
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train
from helpers import REPOSITORY

pytestmark = pytest.mark.long
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs" / "api.md"]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.fixture(scope="module")
def place(embedded_overrides, tmp_path_factory) -> Path:
    """A folder with a run of the embedded model with linear attention, and two images."""
    folder = tmp_path_factory.mktemp("examples")
    steps = ["train.steps=2", "optim.warmup_steps=1", "data.num_workers=0", "eval.data=null"]
    steps += ["train.global_batch_size=8"]
    config = load_config("embedded", [*embedded_overrides, *steps, f"output_dir={folder}/runs"])
    train(config, Mesh.create())
    samples = digit_samples("test", image_size=32, seed=0)
    for name in ("digit.png", "other.png"):
        next(samples).image.save(folder / name)
    return folder


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, place):
    code = code.replace("vit_b16", "vit_s16").replace("ViT-B-16", "ViT-S-16")  # smaller
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

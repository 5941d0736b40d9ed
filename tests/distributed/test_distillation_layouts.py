"""A student learns the same from its teacher in every layout."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_linclip.config import ParallelConfig, load_config
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from helpers import REPOSITORY, job_environment
from helpers.attention_layouts_job import MODEL


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model with larger images, in a hub folder."""
    kinds = [f"model.{tower}.attention.kind=softmax" for tower in ("vision", "text")]
    overrides = [*MODEL, *kinds, "model.vision.image_size=[48,48]", "model.vision.width=96"]
    config = load_config(REPOSITORY / "ds_configs" / "train" / "embedded.yaml", overrides)
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_folder(CLIP(config.model, mesh), folder)
    return folder


def distilled(folder: Path, layout: str, teacher: Path) -> Any:
    command = [sys.executable, "-m", "helpers.distillation_job", str(folder), layout, str(teacher)]
    environment = job_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return torch.load(folder / f"{layout}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layouts",
    [
        ["pp2-micro2"],
        pytest.param(["tp2", "dp2-zero3-micro2", "cp2"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_distils_as_one_process(
    tmp_path: Path, teacher: Path, layouts: list[str]
) -> None:
    (single,) = distilled(tmp_path, "single", teacher)
    assert len({len(terms) for terms in single["terms"]} | {3}) == 1
    first = single["terms"][0]
    expected = 0.5 * first[0] + 2 * first[1] + first[2]
    assert single["losses"][0] == pytest.approx(expected, rel=1e-5)
    for layout in layouts:
        ranks = distilled(tmp_path, layout, teacher)
        losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(single["losses"]), rtol=1e-5, atol=1e-6)
        terms = torch.tensor([rank["terms"] for rank in ranks]).mean(0)
        torch.testing.assert_close(terms, torch.tensor(single["terms"]), rtol=1e-4, atol=1e-6)
        for name, weight in single["weights"].items():
            difference = (ranks[0]["weights"][name] - weight).abs().max()
            assert difference <= 1e-5 * weight.abs().max().clamp(min=1e-2), (layout, name)

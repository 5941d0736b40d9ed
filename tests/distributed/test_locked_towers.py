"""Training with locked towers from a hub folder in parallel layouts, and resuming it."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_linclip.config import ParallelConfig, load_config
from ds_linclip.interop.state_dict import export_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import EMBEDDED
from helpers.forked_ranks import train_in_ranks

pytestmark = pytest.mark.distributed
#: Number of ranks and overrides of each layout.
LAYOUTS = {
    "single": (1, []),
    "micro2": (1, ["train.micro_batch_size=16"]),
    "tp2": (2, ["parallel.tp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "pp2": (2, ["parallel.pp=2", "train.micro_batch_size=16"]),
    "dp2-zero1": (2, ["zero.stage=1"]),
    "dp2-zero2": (2, ["zero.stage=2", "train.micro_batch_size=8"]),
    "dp2-zero3": (2, ["zero.stage=3"]),
}
LOCKED = {
    "image": (["init.lock_image=true"], lambda key: key.startswith("visual.")),
    "text": (
        ["init.lock_text=true"],
        lambda key: not key.startswith(("visual.", "logit_scale")),
    ),
    # The image tower's last block, its norm and projection are trained, the text's projection.
    "part of both": (
        [
            *("init.lock_image=true", "init.lock_image_unlocked_groups=2"),
            *("init.lock_text=true", "init.lock_text_unlocked_layers=1"),
        ],
        lambda key: (
            not key.startswith(("visual.transformer.resblocks.3.", "visual.ln_post"))
            and key not in ("visual.proj", "text_projection", "logit_scale")
        ),
    ),
}
FAST = [("image", "pp2"), ("part of both", "dp2-zero3")]
CASES = [
    pytest.param(locked, layout, marks=[] if (locked, layout) in FAST else pytest.mark.slow)
    for locked in LOCKED
    for layout in LAYOUTS
    if layout != "single"
]


def write_folder(path: Path) -> None:
    """Write a hub folder whose weights differ from every initial value."""
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    torch.manual_seed(7)
    model = CLIP(load_config(EMBEDDED).model, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    export_folder(model, path)
    torch.save(to_open_clip(model), path / "weights.pt")
    mesh.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    run_ranks(1, write_folder, path)
    return path


@pytest.fixture(scope="module")
def stored(folder) -> dict[str, Tensor]:
    return torch.load(folder / "weights.pt")


@pytest.fixture
def train(folder, embedded_overrides, tmp_path):
    def train(layout: str, *more: str, name: str = "run"):
        ranks, axes = LAYOUTS[layout]
        run = [f"output_dir={tmp_path}", f"name={name}", "train.steps=4", "eval.data=null"]
        batch = ["train.global_batch_size=32", "data.num_workers=0", "checkpoint.every_steps=2"]
        log = ["log.every_steps=1", "log.tensorboard=false", "optim.warmup_steps=1"]
        data = [embedded_overrides[0], f"init.pretrained={folder}"]
        return train_in_ranks(
            load_config(EMBEDDED, [*data, *run, *batch, *log, *axes, *more]), ranks
        )

    return train


#: Runs by what is locked, trained when they are first needed.
_SINGLE: dict[str, tuple[dict[int, float], dict[str, Tensor]]] = {}


@pytest.mark.parametrize(("locked", "layout"), CASES)
def test_locked_weights_stay_bit_for_bit_and_the_rest_is_trained(stored, train, locked, layout):
    overrides, is_locked = LOCKED[locked]
    if locked not in _SINGLE:
        _SINGLE[locked] = train("single", *overrides, name="single")
    expected_losses, expected = _SINGLE[locked]
    losses, weights = train(layout, *overrides)
    for step, loss in expected_losses.items():
        assert losses[step] == pytest.approx(loss, rel=1e-5)
    for key, value in weights.items():
        assert torch.equal(value, stored[key]) == is_locked(key), key
        assert torch.equal(expected[key], stored[key]) == is_locked(key), key
        assert (value - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pp2", "pp2"),
        pytest.param("dp2-zero1", "dp2-zero1", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", "dp2-zero3", marks=pytest.mark.slow),
        pytest.param("dp2-zero1", "single", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", "single", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_finds_its_locked_towers(stored, train, tmp_path, before, after):
    """The hub folder that the run started from may be gone."""
    overrides, is_locked = LOCKED["image"]
    form = [*overrides, f"zero.stage={3 if 'zero3' in before else 1}", "train.micro_batch_size=16"]
    whole_losses, whole = train(before, *form, name="whole")
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints", checkpoints)
    shutil.rmtree(checkpoints / "step-00000004")
    losses, weights = train(after, *form, "init.pretrained=nowhere", name="again")
    assert sorted(losses) == [3, 4]
    for step, loss in losses.items():
        assert loss == pytest.approx(whole_losses[step], rel=1e-5)
    for key, value in weights.items():
        assert torch.equal(value, stored[key]) == is_locked(key), key
        if before == after:
            assert torch.equal(value, whole[key]), key

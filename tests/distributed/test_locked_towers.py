"""Training from a folder with locked towers in parallel layouts, and going on from a checkpoint."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from check_layouts import EMBEDDED, Layout, Result, differences, run, run_ranks
from torch import Tensor

from ds_linclip.config import ParallelConfig, load_config
from ds_linclip.model import CLIP
from ds_linclip.model.open_clip_exchange import export_folder, to_open_clip
from ds_linclip.parallel.mesh import Mesh

pytestmark = pytest.mark.distributed
LAYOUTS = [
    Layout(micro_batches=2),
    Layout(tp=2),
    Layout(cp=2),
    Layout(pp=2),
    Layout(dp=2, zero=1),
    Layout(dp=2, zero=2, micro_batches=2),
    Layout(dp=2, zero=3),
]
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
FAST = [("image", Layout(pp=2)), ("part of both", Layout(dp=2, zero=3))]
CASES = [
    pytest.param(
        locked,
        layout,
        marks=[] if (locked, layout) in FAST else pytest.mark.slow,
        id=f"{locked}-{layout.name}",
    )
    for locked in LOCKED
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights away from their initial values, in a folder of open_clip."""
    path = tmp_path_factory.mktemp("pretrained")

    def write() -> None:
        mesh = Mesh.create(ParallelConfig(device="cpu"))
        torch.manual_seed(7)
        model = CLIP(load_config(EMBEDDED).model, mesh)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        export_folder(model, path)
        torch.save(to_open_clip(model), path / "weights.pt")
        mesh.close()

    # The ranks are forked from this process: it must have no process groups of its own.
    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    return path


@pytest.fixture(scope="module")
def stored(folder) -> dict[str, Tensor]:
    return torch.load(folder / "weights.pt")


@pytest.fixture(scope="module")
def train(folder, embedded_overrides):
    def train(layout: Layout, *overrides: str) -> Result:
        data, _ = embedded_overrides
        return run(layout, "linear", 3, [data, f"init.pretrained={folder}", *overrides])

    return train


@pytest.fixture(scope="module")
def single(train) -> dict[str, Result]:
    return {locked: train(Layout(), *overrides) for locked, (overrides, _) in LOCKED.items()}


@pytest.mark.parametrize("locked", LOCKED)
def test_what_is_locked_stays_bit_for_bit_and_the_rest_is_trained(stored, single, locked):
    is_locked = LOCKED[locked][1]
    for key, value in single[locked].weights.items():
        assert torch.equal(value, stored[key]) == is_locked(key), key


@pytest.mark.parametrize(("locked", "layout"), CASES)
def test_layouts_agree(stored, single, train, locked, layout):
    overrides, is_locked = LOCKED[locked]
    result = train(layout, *overrides)
    loss, weights, name = differences(result, single[locked])
    assert loss <= 1e-5
    assert weights <= 1e-5, name
    for key, value in result.weights.items():
        assert torch.equal(value, stored[key]) == is_locked(key), key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(Layout(pp=2), Layout(pp=2), id="pp2"),
        pytest.param(Layout(dp=2), Layout(dp=2), id="zero1", marks=pytest.mark.slow),
        pytest.param(
            Layout(dp=2, zero=3), Layout(dp=2, zero=3), id="zero3", marks=pytest.mark.slow
        ),
        pytest.param(Layout(dp=2), Layout(), id="zero1 to one", marks=pytest.mark.slow),
        pytest.param(
            Layout(dp=2, zero=3), Layout(zero=3), id="zero3 to one", marks=pytest.mark.slow
        ),
    ],
)
def test_resumed_run_finds_its_locked_towers(
    folder, stored, embedded_overrides, tmp_path, before, after
):
    """Also where the folder that it started from is gone."""
    overrides, is_locked = LOCKED["image"]

    def start(name: str, layout: Layout, source: Path) -> Result:
        schedule = ["train.steps=4", "checkpoint.every_steps=2", "optim.warmup_steps=1"]
        run = [f"output_dir={tmp_path}", f"name={name}", "eval.data=null", "data.num_workers=0"]
        batch = ["train.global_batch_size=32", "log.every_steps=1", "log.tensorboard=false"]
        micro = ["train.micro_batch_size=16"]
        more = [f"init.pretrained={source}", *overrides, *layout.overrides(32), *micro]
        data, _ = embedded_overrides
        config = load_config(EMBEDDED, [data, *run, *batch, *schedule, *more])
        return run_ranks(config, layout.ranks)

    whole = start("whole", before, folder)
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints", checkpoints)
    shutil.rmtree(checkpoints / "step-00000004")
    again = start("again", after, tmp_path / "nowhere")
    assert sorted(again.losses) == [3, 4]
    for step, loss in again.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-5)
    for key, value in again.weights.items():
        assert torch.equal(value, stored[key]) == is_locked(key), key
        if before == after:
            assert torch.equal(value, whole.weights[key]), key

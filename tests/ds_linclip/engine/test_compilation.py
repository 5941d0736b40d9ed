"""What is compiled and captured in which layout; nothing is compiled here."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_linclip.config import load_config
from ds_linclip.engine.compilation import Compilation, plan_compilation
from ds_linclip.parallel.mesh import Mesh
from helpers import EMBEDDED

TOWERS = "train.compile=towers"
GRAPHS = [TOWERS, "train.cuda_graphs=true"]
#: Five image sizes, a step each.
SIZES = ", ".join(f"{{from_step: {step}, image_size: {4 * (step + 8)}}}" for step in range(5))


def plan(*overrides: str, dp: int = 1, device: str = "cpu") -> Compilation:
    mesh = replace(
        Mesh.create(), dp=SimpleNamespace(size=dp, rank=0, group=None), device=torch.device(device)
    )
    return plan_compilation(load_config(EMBEDDED, list(overrides)), mesh)


@pytest.mark.parametrize(
    ("overrides", "dp", "model", "loss", "text"),
    [
        ([], 1, "none", False, "nothing"),
        (["train.compile=blocks"], 1, "blocks", False, "blocks"),
        ([TOWERS], 2, "towers", True, "towers and loss"),
        ([TOWERS, "parallel.tp=2", "parallel.cp=2"], 1, "towers", True, "towers and loss"),
        (
            [TOWERS, "zero.stage=3"],
            2,
            "blocks",
            True,
            "blocks and loss (blocks, because zero.stage is 3)",
        ),
        (
            [TOWERS, "model.vision.attention={kind: gated_delta, implementation: fla}"],
            1,
            "blocks",
            True,
            "blocks and loss (blocks, because an attention has the implementation fla)",
        ),
        # A config of earlier versions, in which true meant blocks, is still read.
        (
            ["train.compile=true", f"data.resolutions=[{SIZES}]"],
            1,
            "blocks",
            True,
            "blocks and loss (blocks, because data.resolutions has 5 image sizes (at most 4))",
        ),
        # A rank has 16 of the 128 pairs, in 2 x 2 tiles with those of each of 7 others, twice.
        (
            [TOWERS, "loss.chunk_size=8"],
            8,
            "towers",
            False,
            "towers (no loss, because it has 60 tiles (at most 16))",
        ),
    ],
)
def test_the_largest_part_is_compiled_and_named(overrides, dp, model, loss, text):
    found = plan(*overrides, dp=dp)
    assert (found.model, found.loss, found.text) == (model, loss, text)
    assert found.captured == ()


WHOLE: dict[str, Any] = {"fullgraph": True, "dynamic": False}
CAPTURED = WHOLE | {
    "options": {"triton.cudagraphs": True, "triton.cudagraph_or_error": True},
}


def test_cuda_graphs_hold_no_communication():
    single, data_parallel = plan(*GRAPHS, device="cuda"), plan(*GRAPHS, dp=2, device="cuda")
    assert single.text == "towers and loss; CUDA graphs of model and loss"
    assert single.options("model") == single.options("loss") == CAPTURED
    assert data_parallel.text == "towers and loss; CUDA graphs of model"
    assert data_parallel.options("model") == CAPTURED
    assert data_parallel.options("loss") == plan(TOWERS).options("model") == WHOLE


def test_options_of_cuda_graphs_are_known_to_torch():
    torch.compile(lambda x: x, **CAPTURED)  # a name that torch does not know is an error


def test_cuda_graphs_without_a_device_are_refused():
    with pytest.raises(ValueError, match=r"cuda_graphs \(true\) must have a CUDA device, .*false$"):
        plan(*GRAPHS)


def test_cuda_graphs_of_several_micro_batches_are_refused():
    message = r"^train\.micro_batch_size \(8\) must be a rank's whole part of the batch \(64\) .*"
    with pytest.raises(ValueError, match=message):
        plan(*GRAPHS, "train.micro_batch_size=8", dp=2, device="cuda")

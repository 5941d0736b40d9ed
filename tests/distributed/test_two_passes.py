"""The gradient with a pipeline or micro-batches is that of the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.config import load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import EMBEDDED

BATCH = 16
#: Large, so that a step is exact to the last digits of the gradient and not of the weight.
RATE = 1e3


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 49408, (BATCH, 32), generator=generator)


def in_one_piece() -> dict[str, Tensor]:
    """Return gradients by autograd, from the plain definition of the loss."""
    config = load_config(EMBEDDED, ["parallel.device=cpu"])
    torch.manual_seed(0)
    model = CLIP(config.model, Mesh.create(config.parallel))
    image_features, text_features, log_scale = model(*make_batch())
    logits = log_scale.exp() * image_features @ text_features.T
    labels = torch.arange(BATCH)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_the_engine(pp: int, micro_batches: int, file: Path) -> None:
    """Save the change of the weights by one step of gradient descent without clipping."""
    overrides = [
        f"train.global_batch_size={BATCH}",
        "train.precision=fp32",
        "log.tensorboard=false",
    ]
    overrides += [f"parallel.pp={pp}", f"train.micro_batch_size={BATCH // micro_batches}"]
    config = load_config(EMBEDDED, [*overrides, "optim.clip_grad_norm=0", "parallel.device=cpu"])
    mesh = Mesh.create(config.parallel)
    torch.manual_seed(0)
    model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = initialize_engine(model, optimizer, config, mesh)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.step(make_batch(), lr=RATE)
    moved = {name: (before[name] - p.detach()) / RATE for name, p in model.named_parameters()}
    torch.save(moved, file.with_suffix(f".{mesh.pp.rank}"))
    mesh.close()


@pytest.mark.distributed
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_engines_compute_the_gradient_of_the_whole_batch(tmp_path, pp, micro_batches):
    run_ranks(pp, by_the_engine, pp, micro_batches, tmp_path / "moved")
    expected, found = in_one_piece(), {}
    for stage in range(pp):
        found |= torch.load(tmp_path / f"moved.{stage}")
    assert found.keys() == expected.keys()
    names = sorted(expected)
    gradient, moved = (
        torch.cat([tensors[name].flatten() for name in names]) for tensors in (expected, found)
    )
    assert (moved - gradient).norm() <= 1e-6 * gradient.norm()
    for name in names:
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

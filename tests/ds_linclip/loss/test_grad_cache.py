import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from ds_linclip.config import (
    Config,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    TrainConfig,
    VisionTower,
    ZeroConfig,
)
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.loss.grad_cache import ContrastiveLoss, Targets, surrogate
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

MODEL = ModelConfig(
    embed_dim=24,
    vision=VisionTower(image_size=(16, 16), patch_size=4, width=64, layers=2, head_width=16),
    text=TextTower(context_length=8, vocab_size=60, width=32, heads=2, layers=2),
)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


class Pushed(ContrastiveLoss):
    """The logit scale itself, or its opposite, as the loss."""

    direction = -1.0

    def _terms(
        self, images: Tensor, texts: Tensor, targets: Targets, scale: Tensor, *_: Tensor
    ) -> Tensor:
        return self.direction * scale[None] + 0 * (images.sum() + texts.sum())


def features(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, batch, 8, generator=generator), dim=-1)
    return images, texts


@pytest.mark.parametrize(
    ("log_scale", "expected"),
    [(math.log(20), 20.0), (4.7, 100.0), (50.0, 100.0), (math.log(100), 100.0), (-3.0, 1.0)],
)
def test_logit_scale_is_held_in_range_whatever_the_parameter(
    mesh: Mesh, log_scale: float, expected: float
) -> None:
    objective = ContrastiveLoss(LossConfig(), mesh)
    for dtype in (torch.float32, torch.bfloat16):
        objective([(*features(4), torch.tensor([log_scale], dtype=dtype))])
        scale = objective.logit_scale.item()
        assert 1.0 <= scale <= 100.0001
        assert scale == pytest.approx(expected, rel=2e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("log_scale", "direction", "passes"),
    [
        (2.0, -1.0, True),
        (2.0, 1.0, True),
        (4.7, -1.0, False),  # asks for more than 100
        (4.7, 1.0, True),
        (-0.1, -1.0, True),
        (-0.1, 1.0, False),  # asks for less than 1
    ],
)
def test_logit_scale_gradient_passes_only_inward(
    mesh: Mesh, log_scale: float, direction: float, passes: bool
) -> None:
    objective = Pushed(LossConfig(), mesh)
    objective.direction = direction
    _, gradients = objective([(*features(4), torch.tensor([log_scale]))] * 2)
    expected = direction * objective.logit_scale.item() if passes else 0.0
    assert sum(gradient[2].item() for gradient in gradients) == pytest.approx(expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 8])
def test_two_passes_give_the_gradient_of_the_batch_in_one_piece(
    mesh: Mesh, kind: str, num_micro_batches: int
) -> None:
    torch.manual_seed(0)
    model = CLIP(MODEL, mesh, loss=kind)
    images, texts = torch.randn(16, 3, 16, 16), torch.randint(0, 60, (16, 8))

    image_features, text_features, log_scale, *bias = model(images, texts)
    logits = log_scale.exp() * image_features @ text_features.T
    labels = torch.arange(16)
    if kind == "softmax":
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    else:
        signs = 2 * torch.eye(16) - 1
        loss = -F.logsigmoid(signs * (logits + bias[0])).sum() / 16
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    parts = list(zip(images.chunk(num_micro_batches), texts.chunk(num_micro_batches), strict=True))
    with torch.no_grad():
        outputs = [model(*part) for part in parts]
    found, gradients = ContrastiveLoss(LossConfig(kind=kind), mesh)(outputs)
    for part, gradient in zip(parts, gradients, strict=True):
        surrogate(model(*part), gradient).backward()

    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert len(expected) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference <= 1e-6, name


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_logit_scale_stays_in_range_and_comes_back_under_zero(stage: int, precision: str) -> None:
    softmax = SoftmaxAttention()
    config = Config(
        model=ModelConfig(
            embed_dim=8,
            vision=VisionTower(
                image_size=(8, 8), patch_size=4, width=16, layers=1, head_width=8, attention=softmax
            ),
            text=TextTower(
                context_length=4, vocab_size=10, width=16, heads=2, layers=1, attention=softmax
            ),
        ),
        train=TrainConfig(global_batch_size=2, precision=precision),
        zero=ZeroConfig(stage=stage),
    )
    config.log.tensorboard = False
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    torch.manual_seed(0)
    model = CLIP(config.model, mesh)
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    engine.objective = objective = Pushed(config.loss, mesh)

    scales, largest_parameter = [], -math.inf
    for direction in [-1] * 8 + [1] * 12:  # first ask for more and more, then for less
        objective.direction = direction
        engine.step((torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2, 4))), lr=0.5)
        scales.append(objective.logit_scale.item())
        largest_parameter = max(largest_parameter, model.logit_scale.item())

    assert largest_parameter > math.log(100)  # momentum did carry the parameter past the limit
    assert max(scales) == pytest.approx(100, rel=1e-6)
    assert scales[-1] < 60.0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_compiled_loss_is_one_graph(mesh: Mesh, kind: Literal["softmax", "sigmoid"]) -> None:
    log_values = [torch.tensor([2.5]), torch.tensor([-3.0])][: 1 + (kind == "sigmoid")]
    outputs = [(*features(6), *log_values)] * 2
    settings = LossConfig(kind=kind, chunk_size=5)
    plain, compiled = ContrastiveLoss(settings, mesh), ContrastiveLoss(settings, mesh)
    torch.compiler.reset()
    counters.clear()
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    expected, found = plain(outputs), compiled(outputs)
    assert torch.equal(found[0], expected[0])
    for mine, other in zip(found[1], expected[1], strict=True):
        assert all(map(torch.equal, mine, other))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

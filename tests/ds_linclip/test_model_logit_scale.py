import math

import pytest
import torch

from ds_linclip.config import (
    Attention,
    Config,
    ModelConfig,
    ParallelConfig,
    TextTower,
    TrainConfig,
    VisionTower,
    ZeroConfig,
)
from ds_linclip.model import CLIP
from ds_linclip.optim import build_optimizer
from ds_linclip.parallel.engine import initialize_engine
from ds_linclip.parallel.mesh import Mesh


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_logit_scale_stays_in_range_and_comes_back_under_zero(stage: int, precision: str) -> None:
    softmax = Attention(kind="softmax")
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
    config.optim.lr = 0.5
    config.log.tensorboard = False
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    torch.manual_seed(0)
    model = CLIP(config.model, mesh)
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)

    scales, largest_parameter = [], -math.inf
    for direction in [-1] * 8 + [1] * 12:  # first ask for more and more, then for less
        images, texts = torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2, 4))
        image_features, text_features, scale = engine(images, texts)
        scales.append(scale.item())
        largest_parameter = max(largest_parameter, model.logit_scale.item())
        engine.backward(direction * scale + 0 * (image_features.sum() + text_features.sum()))
        engine.step()

    assert largest_parameter > math.log(100)  # momentum did carry the parameter past the limit
    assert max(scales) == 100.0
    assert scales[-1] < 60.0

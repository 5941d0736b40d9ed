"""Parameters and operations against open_clip's published numbers and a model that is built."""

from dataclasses import replace

import pytest

from ds_linclip.config import (
    Attention,
    Config,
    DataConfig,
    InitConfig,
    LinearAttention,
    LossConfig,
    ModelConfig,
    Resolution,
    SoftmaxAttention,
    TextTower,
    TrainConfig,
    VisionTower,
)
from ds_linclip.model import CLIP
from ds_linclip.model.flops import (
    blocks_flops,
    forward_flops,
    num_parameters,
    step_flops,
    training_flops,
)
from ds_linclip.parallel.mesh import Mesh

SOFTMAX = SoftmaxAttention()
TINY = ModelConfig(
    embed_dim=32,
    vision=VisionTower(image_size=(32, 16), patch_size=8, width=48, layers=2, head_width=16),
    text=TextTower(context_length=8, width=32, heads=2, layers=1),
)


def vit(embed_dim: int, layers: int, width: int, text_width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        embed_dim=embed_dim,
        vision=VisionTower(layers=layers, width=width, attention=SOFTMAX),
        text=TextTower(width=text_width, heads=heads, attention=SOFTMAX),
    )


@pytest.mark.parametrize(
    ("model", "parameters", "gflops"),
    [
        (vit(384, 12, 384, 384, 6), 62_257_537, 12.58),  # ViT-S-16
        (vit(512, 12, 768, 512, 8), 149_620_737, 41.09),  # ViT-B-16
        (vit(768, 24, 1024, 768, 12), 427_739_393, 136.41),  # ViT-L-16
    ],
)
def test_softmax_models_have_the_numbers_of_open_clip(model, parameters, gflops):
    assert num_parameters(model, LossConfig()) == parameters
    assert round(forward_flops(model, (224, 224)) / 1e9, 2) == gflops


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_parameters_are_those_of_the_model(head_norm, loss):
    TINY.vision.attention = TINY.text.attention = LinearAttention(head_norm=head_norm)
    built = CLIP(TINY, Mesh.create(), loss=loss)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert num_parameters(TINY, LossConfig(kind=loss)) == count


def test_attention_pooling_costs_its_own_products():
    def cost(pool_type: str) -> float:
        vision = replace(TINY.vision, class_token=False, pool_type=pool_type)
        return forward_flops(replace(TINY, vision=vision), (32, 16))

    tokens, query = 8, 1
    keys_and_values = 2 * tokens * 48 * (48 + 48)
    scores_and_sum = 2 * query * tokens * 48 + 2 * query * tokens * 48
    query_output_mlp = 2 * 48 * 48 + 2 * 48 * 48 + 2 * 48 * 192 + 2 * 192 * 48
    assert cost("map") - cost("avg") == keys_and_values + scores_and_sum + query_output_mlp


def test_attention_costs_its_own_products():
    def cost(attention: Attention, num_tokens: int) -> float:
        tower = VisionTower(width=128, head_width=32, layers=1, attention=attention)
        return sum(blocks_flops(tower, num_tokens)) - num_tokens * 2 * 128 * 12 * 128

    affine, quadratic = LinearAttention(), LinearAttention(feature_map="quadratic")
    assert cost(SoftmaxAttention(), 100) == 2 * 2 * 100 * 100 * 128
    # Each of 4 heads: a state of 32 x 32, added to and read by every token.
    assert cost(affine, 100) == 4 * 2 * 2 * 100 * 32 * 32
    assert cost(quadratic, 100) == 4 * 2 * 2 * 100 * (32 + 32 * 17) * 32
    assert cost(affine, 200) == 2 * cost(affine, 100)
    assert cost(SoftmaxAttention(), 200) == 4 * cost(SoftmaxAttention(), 100)


def test_a_run_costs_three_forwards_of_every_pair_at_its_size():
    train = TrainConfig(steps=10, global_batch_size=4)
    stages = [Resolution(image_size=(16, 16)), Resolution(from_step=6, image_size=(32, 16))]
    late = Resolution(from_step=10, image_size=(64, 64))
    config = Config(model=TINY, train=train, data=DataConfig(resolutions=[*stages, late]))
    small, large = forward_flops(TINY, (16, 16)), forward_flops(TINY, (32, 16))
    assert small < large
    assert training_flops(config) == pytest.approx(3 * 4 * (6 * small + 4 * large))
    config.data.resolutions = []
    assert training_flops(config) == pytest.approx(3 * 4 * 10 * large)


def test_frozen_layers_cost_their_forward_only():
    config = Config(model=TINY, train=TrainConfig(steps=1, global_batch_size=1))
    forward, whole = forward_flops(TINY, (32, 16)), step_flops(config, 0)
    assert whole == 3 * forward
    config.init = InitConfig(lock_image=True)
    locked = step_flops(config, 0)
    config.init = InitConfig(lock_text=True)
    assert (whole - locked) + (whole - step_flops(config, 0)) == pytest.approx(2 * forward)
    config.init = InitConfig(lock_image=True, lock_image_unlocked_groups=2)
    head, block = 2 * 48 * 32, blocks_flops(TINY.vision, 9)[-1]
    assert step_flops(config, 0) - locked == pytest.approx(2 * (head + block))
    config.init.lock_image_unlocked_groups = TINY.vision.layers + 2
    assert step_flops(config, 0) == whole


def test_dropped_patches_cost_nothing():
    dropping = ModelConfig(vision=VisionTower(patch_dropout=0.5))
    fewer = ModelConfig(vision=VisionTower(image_size=(112, 224)))
    whole = forward_flops(fewer, (112, 224))
    assert forward_flops(dropping, (224, 224)) == whole < forward_flops(fewer, (224, 224))

"""LUNA's feature map: known values, and no feature without a gradient at the start."""

import pytest
import torch
from torch import Tensor, nn

from ds_linclip.config import LunaAttention, ModelConfig, TextTower, VisionTower
from ds_linclip.model import CLIP
from ds_linclip.model.attention.luna import Attention
from ds_linclip.parallel.mesh import Mesh
from helpers.attention_layers import make_layer
from linclip_kernels.linear_attention.reference import relative_rms


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def test_parameters_are_shared_by_heads_and_few(mesh):
    shapes = Attention.own_shapes(LunaAttention(), 768, 12, causal=False)
    assert shapes == {
        "directions": (16, 64),
        "offsets": (16,),
        "hidden_weight": (64,),
        "hidden_bias": (64,),
        "channel_weight": (4, 64),
        "channel_bias": (4,),
    }
    layer = make_layer(mesh, LunaAttention(), width=768, heads=12)
    assert layer.num_shared == 1428


def test_cost_includes_the_map_of_queries_and_of_keys():
    mapped = 16 * (2 * 64 + 2 * 64 + 2 * 64 * 4)
    cost = Attention.flops(LunaAttention(), 64, 197, causal=False)
    assert cost == 2 * mapped + 4 * 64 * 64
    assert Attention.num_state_values(LunaAttention(channels=8), 64) == (128 + 1) * (64 + 1)


def test_positive_and_negative_parts_of_the_entries_are_a_known_score(mesh):
    layer = make_layer(mesh, LunaAttention(directions=16, channels=2, hidden=2)).double()
    steepness = 1e8  # softplus(c x) / c is near relu(x)
    with torch.no_grad():
        layer.directions.copy_(torch.eye(16))
        layer.hidden_weight.copy_(torch.tensor([1.0, -1.0]))
        layer.channel_weight.copy_(steepness * torch.eye(2))
        layer.hidden_bias.zero_()
        layer.channel_bias.zero_()
    q, k, v = torch.randn(3, 2, 7, 4, 16, dtype=torch.float64)
    score = torch.einsum("bnhd,bmhd->bhnm", q.relu(), k.relu())
    score += torch.einsum("bnhd,bmhd->bhnm", (-q).relu(), (-k).relu())
    expected = torch.einsum("bhnm,bmhd->bnhd", score / score.sum(-1, keepdim=True), v)
    with torch.no_grad():
        assert relative_rms(layer.attend(q, k, v), expected) <= 1e-6
        phi, _ = layer.features(q, k, dtype=torch.float64)
        assert relative_rms(phi[..., 0] / steepness, q[..., 0].relu() / 4) <= 1e-6
        assert relative_rms(phi[..., 3] / steepness, (-q[..., 1]).relu() / 4) <= 1e-6


def test_no_feature_is_dead_at_first_for_normal_inputs(mesh):
    for seed in range(5):
        layer = make_layer(mesh, LunaAttention(), width=256, seed=seed)
        inputs = torch.randn(2, 4, 200, 4, 64)
        assert dead_share(layer, *inputs) == 0
        assert dead_share(layer, *nn.functional.normalize(inputs, dim=-1)) == 0


def test_no_feature_is_dead_in_a_fresh_model(mesh):
    for seed in range(3):
        torch.manual_seed(seed)
        attention = LunaAttention()
        vision = VisionTower(
            image_size=(32, 32), patch_size=8, width=128, layers=4, attention=attention
        )
        text = TextTower(
            context_length=16, vocab_size=60, width=128, heads=2, layers=4, attention=attention
        )
        model = CLIP(ModelConfig(embed_dim=32, vision=vision, text=text), mesh)
        inputs: list[tuple[Attention, Tensor]] = []
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(
                    lambda layer, args, inputs=inputs: inputs.append((layer, args[0]))
                )
        with torch.no_grad():
            model(torch.randn(4, 3, 32, 32), torch.randint(1, 59, (4, 16)))
            shares = [dead_share(layer, *layer.project(x)[:2]) for layer, x in inputs]
        assert shares == [0] * 8


def dead_share(layer: Attention, *inputs: Tensor) -> float:
    """Return the share of features that are zero, and have no gradient, for all inputs."""
    with torch.no_grad():
        features = layer.features(*inputs, dtype=torch.float32)
    return sum((each.amax((0, 1, 2)) <= 1e-6).float().mean().item() for each in features)

"""The learning rate's shape and the weight-decay groups."""

import pytest

from ds_linclip.config import ModelConfig, OptimConfig, TextTower, VisionTower
from ds_linclip.model import CLIP
from ds_linclip.optim import learning_rate, weight_decay_groups
from ds_linclip.parallel.mesh import Mesh


def test_learning_rate_warms_up_and_falls_to_zero():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half of the cosine
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.08
    assert learning_rate(12, 12, config) == pytest.approx(0, abs=1e-12)


def test_matrices_are_decayed_and_vectors_are_not():
    vision = VisionTower(image_size=(8, 8), patch_size=4, width=32, layers=1, head_width=16)
    text = TextTower(context_length=4, width=32, heads=2, layers=1)
    model = CLIP(ModelConfig(embed_dim=8, vision=vision, text=text), Mesh.create())
    decayed, kept = weight_decay_groups(model, 0.2)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert not decayed_names & kept_names
    assert "logit_scale" in kept_names
    assert "visual.class_embedding" in kept_names
    endings = ("bias", "ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight")
    assert all(not name.endswith(endings) for name in decayed_names)
    assert {"visual.conv1.weight", "visual.proj", "text.positional_embedding"} <= decayed_names


def test_frozen_parameters_are_left_out():
    vision = VisionTower(image_size=(8, 8), patch_size=4, width=32, layers=1, head_width=16)
    text = TextTower(context_length=4, width=32, heads=2, layers=1)
    model = CLIP(ModelConfig(embed_dim=8, vision=vision, text=text), Mesh.create())
    model.text.requires_grad_(False)
    groups = weight_decay_groups(model, 0.2)
    taken = {id(p) for group in groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}

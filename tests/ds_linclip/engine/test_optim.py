"""Learning rate, EMA decay, weight-decay groups, the optimizers and the average of the weights.

The optimizers under ZeRO are tested in tests/distributed/test_optimizers.py.
"""

import math
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from open_clip_train.scheduler import const_lr_cooldown
from torch import nn

from ds_linclip.config import (
    ConstantSchedule,
    CooldownSchedule,
    CosineSchedule,
    LinearSchedule,
    ModelConfig,
    OptimConfig,
    TextTower,
    VisionTower,
)
from ds_linclip.engine.ema import ema_weights, track_ema
from ds_linclip.engine.optim import (
    Lamb,
    build_optimizer,
    ema_decay,
    learning_rate,
    weight_decay_groups,
)
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh


def test_learning_rate_warms_up_and_falls_to_zero():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half of the cosine
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.08
    assert learning_rate(12, 12, config) == pytest.approx(0, abs=1e-12)


def test_cosine_is_as_before_bit_for_bit():
    config = OptimConfig(lr=5e-4, warmup_steps=7)
    for step in range(7, 1001):
        angle = math.pi * ((step - 7) / (1000 - 7))
        assert learning_rate(step, 1000, config) == 5e-4 * 0.5 * (1 + math.cos(angle))


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (CosineSchedule(floor=0.1), {4: 1.0, 8: 0.55, 12: 0.1}),
        (LinearSchedule(floor=0.2), {4: 1.0, 6: 0.8, 8: 0.6, 12: 0.2}),
        (LinearSchedule(), {8: 0.5, 12: 0.0}),
        (ConstantSchedule(), {4: 1.0, 11: 1.0, 12: 1.0}),
        (CooldownSchedule(cooldown_steps=4), {4: 1.0, 8: 1.0, 9: 0.75, 11: 0.25, 12: 0.0}),
        (CooldownSchedule(cooldown_steps=4, power=2, floor=0.2), {8: 1.0, 10: 0.4, 12: 0.2}),
        (CooldownSchedule(cooldown_steps=8), {4: 1.0, 6: 0.75}),
    ],
    ids=lambda value: value.kind if hasattr(value, "kind") else None,
)
def test_schedules_after_the_warm_up(schedule, at):
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule=schedule)
    assert [learning_rate(step, 12, config) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for step, factor in at.items():
        assert learning_rate(step, 12, config) == pytest.approx(2 * factor, abs=1e-12), step


def test_cooldown_is_that_of_open_clip():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = const_lr_cooldown(optimizer, 1.0, 3, 20, 6, 1.5, 0.25)
    schedule = CooldownSchedule(cooldown_steps=6, power=1.5, floor=0.25)
    config = OptimConfig(lr=1.0, warmup_steps=3, schedule=schedule)
    for step in range(20):
        assert learning_rate(step, 20, config) == pytest.approx(theirs(step), rel=1e-12), step


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


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def step_on(model, optimizer, seed):
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "form"), [("adamw", torch.optim.AdamW), ("lion", timm.optim.Lion), ("lamb", Lamb)]
)
def test_optimizer_is_built_as_configured(kind, form):
    config = OptimConfig(kind=kind, lr=0.02, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.3)
    optimizer = build_optimizer(small_model(), config)
    assert type(optimizer) is form
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"])) == (0.02, (0.8, 0.95))
        assert group.get("eps", 1e-7) == 1e-7


@pytest.mark.parametrize(("kind", "beta2"), [("adamw", 0.98), ("lion", 0.99), ("lamb", 0.98)])
def test_second_beta_depends_on_the_optimizer_unless_it_is_set(kind, beta2):
    for config, expected in (
        (OptimConfig(kind=kind), beta2),
        (OptimConfig(kind=kind, beta2=0.5), 0.5),
        (OptimConfig(kind=kind, beta2=0.0), 0.0),
    ):
        optimizer = build_optimizer(small_model(), config)
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.9, expected)}


def test_lamb_equals_timms():
    config = OptimConfig(kind="lamb", lr=0.02, weight_decay=0.3)
    model, other = small_model(), small_model()
    with torch.no_grad():  # no trust ratio without weights
        model[0].weight.zero_()
        other[0].weight.zero_()
    optimizer = build_optimizer(model, config)
    reference = timm.optim.Lamb(
        weight_decay_groups(other, 0.3), lr=0.02, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for seed in range(20):
        step_on(model, optimizer, seed)
        step_on(other, reference, seed)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert (after - expected).abs().max() < 1e-6
    assert (after - before).abs().max() > 0.1


def test_lamb_refuses_tensors_whose_parameters_it_does_not_know():
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(kind="lamb"))
    flat = torch.zeros(4, requires_grad=True)
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]  # as ZeRO does
    with pytest.raises(RuntimeError, match=r"Lamb\.attach must be called"):
        optimizer.step()


def test_ema_decay_warms_up():
    assert ema_decay(0, 0.99) == 0.1
    assert ema_decay(10, 0.99) == 0.55
    assert ema_decay(889, 0.99) == pytest.approx(890 / 899)
    assert ema_decay(891, 0.99) == ema_decay(10**6, 0.99) == 0.99


def test_averages_replace_the_weights_during_evaluation_only():
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.05))
    track_ema(optimizer)
    engine = SimpleNamespace(optimizer=optimizer)
    with ema_weights(engine):
        pass  # nothing to average yet
    average = None
    for step, decay in enumerate((0.3, 0.6, 0.9)):
        for group in optimizer.param_groups:
            group["ema_decay"] = decay
        step_on(model, optimizer, step)
        weights = [p.detach().clone() for p in model.parameters()]
        average = average or weights
        average = [decay * old + (1 - decay) * p for old, p in zip(average, weights, strict=True)]

    with ema_weights(engine):
        for p, expected in zip(model.parameters(), average, strict=True):
            assert p.allclose(expected, atol=1e-7)
        assert not any(p.allclose(w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.equal(w) for p, w in zip(model.parameters(), weights, strict=True))


def test_frozen_and_unused_parameters_have_no_average():
    model = small_model()
    model[2].requires_grad_(False)
    unused = nn.Linear(2, 2)
    optimizer = build_optimizer(nn.ModuleList([model, unused]), OptimConfig(lr=0.05))
    track_ema(optimizer)
    for step in range(2):
        for group in optimizer.param_groups:
            group["ema_decay"] = 0.5
        step_on(model, optimizer, step)
    before = [p.detach().clone() for p in (*model[2].parameters(), *unused.parameters())]
    with ema_weights(SimpleNamespace(optimizer=optimizer)):
        seen = [*model[2].parameters(), *unused.parameters()]
        assert all(p.equal(b) for p, b in zip(seen, before, strict=True))
    assert not any("ema" in optimizer.state[p] for p in unused.parameters())

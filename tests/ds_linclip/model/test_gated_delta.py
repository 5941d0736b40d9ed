"""Gated DeltaNet as a layer: what it begins with, what a token sees, and InfiniteVL's layout."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ds_linclip.config import (
    Attention,
    GatedDeltaAttention,
    InitConfig,
    ModelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    load_config,
)
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.model.attention import SelfAttention
from ds_linclip.model.flops import blocks_flops
from ds_linclip.parallel.mesh import Mesh
from helpers import REPOSITORY, attention_layers

WIDTH, HEADS = 32, 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def make_layer(
    mesh: Mesh, settings: GatedDeltaAttention | None = None, *, causal: bool, width: int = WIDTH
) -> SelfAttention:
    settings = settings or GatedDeltaAttention()
    return attention_layers.make_layer(mesh, settings, causal=causal, width=width, heads=HEADS)


def test_decay_begins_as_published(mesh):
    layers = [make_layer(mesh, causal=False) for _ in range(2)]
    assert torch.equal(layers[0].a_log, layers[1].a_log)
    own = type(layers[0]).own_parameters(GatedDeltaAttention(), WIDTH, HEADS, causal=True)
    rates, steps = (torch.empty(10_000) for _ in range(2))
    own["a_log"].init(rates)
    own["dt_bias"].init(steps)
    rates, steps = rates.exp(), nn.functional.softplus(steps)
    assert 0 < rates.min() < 0.1
    assert 15.9 < rates.max() <= 16.01
    assert rates.mean() == pytest.approx(8, abs=0.2)
    assert 0.00099 < steps.min() < 0.0011
    assert 0.095 < steps.max() < 0.1001
    assert steps.log().mean() == pytest.approx(-4.605, abs=0.05)  # the logarithm of 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_start_from_softmax_mixes_no_neighbours_and_hardly_decays(mesh, causal):
    layer = make_layer(mesh, causal=causal)
    layer.start_from_softmax()
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        plain = layer.project(x)
        q, k, v, beta, log_decay = layer.prepare(x, None)
    q_0, k_0, v_0 = (nn.functional.silu(each) for each in plain)
    for scan in range(layer.num_scans):
        heads = slice(scan * HEADS, (scan + 1) * HEADS)
        torch.testing.assert_close(v[:, :, heads], v_0)
        unit = nn.functional.normalize(torch.stack([q_0, k_0]), dim=-1)
        torch.testing.assert_close(q[:, :, heads], unit[0] / 4, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(k[:, :, heads], unit[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(beta, torch.full_like(beta, 0.5))
    torch.testing.assert_close(log_decay, torch.full_like(log_decay, -1e-3))


def test_the_class_token_sees_patches_in_the_scan_backwards(mesh):
    layer = make_layer(mesh, causal=False)
    with torch.no_grad():
        weights = layer.weights(torch.randn(1, 7, WIDTH))
    forwards, backwards = weights.tensor_split(2, dim=1)
    assert not forwards.triu(1).any()
    assert not backwards.tril(-1).any()
    assert backwards[:, :, 0].all()


def test_scans_have_taps_and_gates_of_their_own(mesh):
    layer = make_layer(mesh, causal=False).double()
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    turned = x.flip(1)
    with torch.no_grad():
        before = layer(turned)
        for name, size in (("conv_weight", 4), ("beta_weight", 1), ("decay_weight", 1)):
            parameter = getattr(layer, name)
            if name == "conv_weight":
                parameter.copy_(parameter.unflatten(1, (2, size)).flip(1).flatten(1))
            else:
                parameter.copy_(parameter.unflatten(0, (HEADS, 2)).flip(1).flatten(0, 1))
        for name in ("a_log", "dt_bias"):
            parameter = getattr(layer, name)
            parameter.copy_(parameter.unflatten(0, (HEADS, 2)).flip(1).flatten())
        torch.testing.assert_close(layer(x).flip(1), before, rtol=1e-12, atol=1e-12)


def test_fla_must_be_installed_where_there_is_a_gpu(mesh, monkeypatch):
    settings = GatedDeltaAttention(implementation="fla")
    x = torch.randn(1, 5, WIDTH)
    expected = make_layer(mesh, causal=True)(x)
    assert torch.equal(make_layer(mesh, settings, causal=True)(x), expected)
    name = "ds_linclip.model.attention.gated_delta.find_spec"
    monkeypatch.setattr(name, lambda package: None)
    on_gpu = replace(mesh, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"implementation \(fla\) must be installed: pip install"):
        make_layer(on_gpu, settings, causal=True)


def test_decay_and_gains_are_vectors_without_weight_decay(mesh):
    vectors = {n for n, p in make_layer(mesh, causal=False).named_parameters() if p.ndim < 2}
    assert vectors == {"a_log", "dt_bias", "norm_weight", "qkv.bias", "out_proj.bias"}


def tower(attention: Attention) -> VisionTower:
    return VisionTower(
        image_size=(16, 16), patch_size=4, width=128, head_width=32, layers=1, attention=attention
    )


@pytest.mark.parametrize(("gate", "gate_cost"), [(True, 2 * 128 * 128), (False, 0)])
def test_a_layer_costs_its_own_products(gate, gate_cost):
    layer = GatedDeltaAttention(gate=gate, conv_size=3)
    (cost,) = blocks_flops(tower(layer), 100)
    scan = 6 * 32 * 32 + 3 * 2 * 3 * 32
    two_gates = 2 * 2 * 128
    own = gate_cost + 4 * 2 * (scan + two_gates)
    assert cost - 100 * 2 * 128 * 12 * 128 == 100 * own


def test_weights_of_a_softmax_model_become_those_of_the_layer(mesh, tmp_path):
    models = []
    for seed, attention in enumerate((SoftmaxAttention(), GatedDeltaAttention())):
        torch.manual_seed(seed)
        text = TextTower(width=64, heads=4, layers=1, attention=attention)
        config = ModelConfig(embed_dim=16, vision=tower(attention), text=text)
        models.append(CLIP(config, mesh))
    trained, model = models
    export_folder(trained, tmp_path / "hub")
    load_pretrained(model, InitConfig(pretrained=str(tmp_path / "hub"), change_attention=True))
    for side in ("visual", "text"):
        theirs, layer = (getattr(each, side).blocks["0"].attn for each in (trained, model))
        assert torch.equal(layer.qkv.weight, theirs.qkv.weight)
        assert layer.beta_weight.count_nonzero() == 0
        assert torch.equal(layer.conv_weight[:, 3], torch.ones(len(layer.conv_weight)))


def test_the_layout_of_the_docs_trains(mesh, tmp_path):
    text = (REPOSITORY / "docs" / "attention.md").read_text("utf-8")
    (example,) = (each for each in text.split("```")[1::2] if "0::4" in each)
    (tmp_path / "hybrid.yaml").write_text(example.removeprefix("yaml"))
    small = ["model.vision.layers=8", "model.vision.width=64", "model.vision.head_width=32"]
    small += ["model.vision.image_size=32", "model.vision.patch_size=4", "model.embed_dim=16"]
    small += ["model.text.layers=5", "model.text.width=64", "model.text.heads=2"]
    run = ["data.train=[x.tar]", "train.steps=3", "train.global_batch_size=2"]
    run += ["optim.warmup_steps=0"]
    config = load_config(tmp_path / "hybrid.yaml", [*small, *run]).model
    torch.manual_seed(0)
    model = CLIP(config, mesh)
    kinds = [block.attn.settings.kind for block in model.visual.blocks.values()]
    assert kinds == ["window", *["gated_delta"] * 3] * 2
    kinds = [block.attn.settings.kind for block in model.text.blocks.values()]
    assert kinds == ["window", *["gated_delta"] * 3, "window"]
    texts = torch.randint(1, 100, (2, config.text.context_length))
    texts[:, -1] = config.text.vocab_size - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, losses = torch.randn(2, 3, 32, 32), []
    for _ in range(3):
        image, caption, *_ = model(images, texts)
        logits = 10 * nn.functional.normalize(image) @ nn.functional.normalize(caption).T
        loss = nn.functional.cross_entropy(logits, torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]

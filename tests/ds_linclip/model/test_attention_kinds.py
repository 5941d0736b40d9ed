"""Every kind of attention against its definition, and what all kinds must do."""

import json
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

from ds_linclip.config import (
    ATTENTION_KINDS,
    Attention,
    LayerAttention,
    LinearAttention,
    LossConfig,
    ModelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    check_model,
)
from ds_linclip.interop.hub_folder import CONFIG_FILE
from ds_linclip.interop.key_mapping import open_clip_shapes
from ds_linclip.interop.state_dict import export_folder, load_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.model.attention import Patches
from ds_linclip.model.block import Block, BlockInit
from ds_linclip.model.flops import blocks_flops, num_parameters
from ds_linclip.parallel.mesh import Mesh
from helpers import REPOSITORY
from helpers.attention_definitions import CASES, define
from helpers.attention_layers import before_projection, make_layer
from linclip_kernels.linear_attention.reference import relative_rms

WIDTH, HEADS = 64, 4
BOTH = [
    (name, causal)
    for name, case in CASES.items()
    for causal in (False, True)
    if (case.is_causal if causal else case.is_bidirectional)
]
CAUSAL = [name for name, case in CASES.items() if case.is_causal]
BIDIRECTIONAL = [name for name, case in CASES.items() if case.is_bidirectional]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def places(num_tokens: int, *, causal: bool) -> Patches | None:
    """Return a grid that is not square, if the number of patches allows it; of two images."""
    patches = num_tokens - 1
    if causal:
        return None
    if patches == 0:
        return Patches(1, 1, torch.empty(2, 0, dtype=torch.int64))
    rows = max(n for n in range(1, 1 + int(patches**0.5)) if patches % n == 0)
    return Patches(rows, patches // rows)


def may_be_causal(settings: Any) -> bool:
    return not any(settings.problems(causal=True))


def clip_config(settings: Any, **vision: Any) -> ModelConfig:
    return ModelConfig(
        embed_dim=24,
        vision=VisionTower(
            image_size=(16, 24),
            patch_size=4,
            width=64,
            layers=2,
            head_width=16,
            attention=settings,
            **vision,
        ),
        text=TextTower(
            context_length=12,
            vocab_size=60,
            width=64,
            heads=4,
            layers=2,
            attention=settings if may_be_causal(settings) else SoftmaxAttention(),
        ),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 58, (3, 12), generator=generator)
    texts[:, -1] = 59
    return torch.randn(3, 3, 16, 24, generator=generator), texts


def test_every_kind_has_a_case_and_a_row_of_the_table():
    assert {case.settings.kind for case in CASES.values()} == set(ATTENTION_KINDS)
    assert len(get_args(Attention)) == len(ATTENTION_KINDS)  # a kind has one dataclass
    table = (REPOSITORY / "docs" / "attention.md").read_text("utf-8").split("| kind |")[1]
    rows = table.split("\n\n")[0].splitlines()[2:]
    assert {row.split("`")[1] for row in rows} == set(ATTENTION_KINDS)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 13])
@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_a_layer_is_its_definition(mesh, name, causal, num_tokens):
    case = CASES[name]
    layer = make_layer(mesh, case.settings, causal=causal, is_trained=True).double()
    patches = places(num_tokens, causal=causal)
    x = torch.randn(2, num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [p for n, p in layer.named_parameters() if not n.startswith("out_proj")]
    results = []
    for compute in (before_projection, partial(define, case)):
        o = compute(layer, x, patches)
        grad = torch.ones_like(o) + torch.arange(o.numel()).view(o.shape) % 7
        gradients = torch.autograd.grad(o, [x, *parameters], grad, allow_unused=True)
        results.append((o, *gradients))
    names = ["output", "x", *(n for n, _ in layer.named_parameters())]
    for what, found, expected in zip(names, *results, strict=False):
        if expected is None:
            assert found is None or not found.any(), what
            continue
        error = (found - expected).square().mean().sqrt()
        assert error <= 1e-9 * max(1, expected.square().mean().sqrt()), what


@pytest.mark.parametrize("num_tokens", [77, 197])
@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_single_precision_is_near_the_definition_of_long_sequences(mesh, name, causal, num_tokens):
    case = CASES[name]
    layer, patches = (
        make_layer(mesh, case.settings, causal=causal),
        places(num_tokens, causal=causal),
    )
    x = torch.randn(1, num_tokens, WIDTH)
    with torch.no_grad():
        found = before_projection(layer, x, patches)
        expected = define(case, layer.double(), x.double(), patches)
    assert relative_rms(found, expected) <= 1e-4


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_nothing_in_a_text(mesh, name):
    layer = make_layer(mesh, CASES[name].settings, causal=True)
    x = torch.randn(1, 77, WIDTH)
    whole = layer(x)
    for j in (1, 40, 63, 64, 76):
        changed = x.clone()
        changed[:, j:] = torch.randn(77 - j, WIDTH)
        assert torch.equal(layer(changed)[:, :j], whole[:, :j]), j


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_weights_make_the_output_of_attention(mesh, name, causal):
    layer = make_layer(mesh, CASES[name].settings, causal=causal).double()
    patches, x = places(13, causal=causal), torch.randn(2, 13, WIDTH, dtype=torch.float64)
    if not layer.settings.has_weights:
        with pytest.raises(ValueError, match=r"attention \(.*\) must have a number as the weight"):
            layer.weights(x, patches)
        return
    with torch.no_grad():
        weights = layer.weights(x, patches)
        q, k, v, *more = layer.prepare(x, patches)
        o = layer.attend(q, k, v, *more)
    num_maps = weights.shape[1]  # Equal parts of a head's values may have different weights.
    assert weights.shape == (2, num_maps, 13, 13)
    assert num_maps % HEADS == 0
    v, o = (each.flatten(2).unflatten(2, (num_maps, -1)).transpose(1, 2) for each in (v, o))
    assert relative_rms(weights @ v, o) <= 1e-12
    if causal:
        assert not weights.triu(1).any()


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_recomputation_gives_the_same_bits_with_the_linear_of_zero3(
    mesh, name, causal, monkeypatch
):
    """It adds a bias in place, to a product that "selective" keeps."""
    monkeypatch.setattr(nn.functional, "linear", zero3_linear_wrap)
    torch.manual_seed(0)
    options: Any = {"causal": causal, "init": BlockInit.vision()}
    block = Block(WIDTH, HEADS, 2.0, CASES[name].settings, mesh, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, patches = torch.randn(2, 7, WIDTH, requires_grad=True), places(7, causal=causal)
    gradients = []
    for what in ("none", "selective", "full"):
        block.recompute = what
        loss = block(x, patches).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *block.parameters()], allow_unused=True))
    for found in gradients[1:]:
        for each, expected in zip(found, gradients[0], strict=True):
            assert expected is None or torch.equal(each, expected)


@pytest.mark.parametrize("num_class", [0, 1])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_dropped_patches_are_left_out_with_and_without_a_class_token(mesh, name, num_class):
    case = CASES[name]
    layer = make_layer(mesh, case.settings, causal=False).double()
    kept = torch.tensor([[0, 1, 4, 7, 10], [2, 3, 5, 8, 11]])
    x = torch.randn(2, num_class + 5, WIDTH, dtype=torch.float64)
    patches = Patches(3, 4, kept, num_class)
    with torch.no_grad():
        found = before_projection(layer, x, patches)
        assert relative_rms(found, define(case, layer, x, patches)) <= 1e-9
        everything = torch.arange(12).expand(2, -1)
        whole = torch.randn(2, num_class + 12, WIDTH, dtype=torch.float64)
        again = layer(whole, Patches(3, 4, everything, num_class))
        expected = layer(whole, Patches(3, 4, None, num_class))
        assert relative_rms(again, expected) <= 1e-12


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_towers_without_class_token_and_mask_have_the_parameters_and_the_cost_that_are_said(
    mesh, name
):
    settings = CASES[name].settings
    config = clip_config(settings, class_token=False, pool_type="map", ls_init_value=0.1)
    config.vision.no_ln_pre, config.vision.proj_type, config.embed_dim = True, "none", 64
    text = config.text
    text.no_causal_mask, text.pool_type, text.proj_bias = True, "last", True
    text.attention = SoftmaxAttention() if settings.needs_grid else settings
    check_model(replace(config, text=replace(text, vocab_size=49408)))
    model = CLIP(config, mesh)
    images, texts = batch()
    with torch.no_grad():
        text_features = model.encode_text(texts)
        changed = texts.clone()
        changed[:, -2] = 1 + texts[:, -2] % 50
        assert not torch.allclose(model.encode_text(changed), text_features)
        assert model.encode_image(images).shape == (3, 64)
    num = sum(p.numel() for p in model.parameters())
    assert num == num_parameters(config, LossConfig())
    weights = {key: tuple(value.shape) for key, value in to_open_clip(model).items()}
    assert weights == open_clip_shapes(config, with_bias=False)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_parameters_have_the_shapes_and_the_cost_that_are_said(mesh, name, causal):
    settings = CASES[name].settings
    layer = make_layer(mesh, settings, causal=causal)
    common = {"qkv.weight", "qkv.bias", "out_proj.weight", "out_proj.bias"}
    own = {n: tuple(p.shape) for n, p in layer.named_parameters() if n not in common}
    assert type(layer).own_shapes(settings, WIDTH, HEADS, causal=causal) == own
    # A part of the cost may be per sequence.
    costs = [n * type(layer).flops(settings, 16, n, causal=causal) for n in (50, 100)]
    assert 0 < costs[0] < costs[1]


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_parameters_of_a_kind_leave_the_other_weights_as_they_are(mesh, name, causal):
    layer = make_layer(mesh, CASES[name].settings, causal=causal)
    following = torch.randn(3)
    plain = make_layer(mesh, SoftmaxAttention(), causal=causal)
    assert torch.equal(torch.randn(3), following)
    assert torch.equal(layer.qkv.weight, plain.qkv.weight)
    assert torch.equal(layer.out_proj.weight, plain.out_proj.weight)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_model_trains_and_recomputes_the_same_bits(mesh, name):
    settings = CASES[name].settings
    gradients = {}
    for what in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = CLIP(clip_config(settings), mesh)
        model.recompute_activations(what)
        image, text, *_ = model(*batch())
        (image * text).sum().backward()
        gradients[what] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        missing = {n for n, p in model.named_parameters() if p.grad is None}
        assert missing <= {"logit_scale"}
    for name, expected in gradients["none"].items():
        assert torch.isfinite(expected).all(), name
        for what in ("selective", "full"):
            assert torch.equal(gradients[what][name], expected), (what, name)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_features_in_bfloat16_are_near_those_in_single_precision(mesh, name):
    torch.manual_seed(0)
    model, (images, texts) = CLIP(clip_config(CASES[name].settings), mesh), batch()
    with torch.no_grad():
        exact = model(images, texts)[:2]
        model.compute_in(torch.bfloat16)
        mixed = model(images, texts)[:2]
        rounded = model.to(torch.bfloat16)(images.bfloat16(), texts)[:2]
    for found in (mixed, rounded):
        for each, expected in zip(found, exact, strict=True):
            assert 0 < relative_rms(each, expected) <= 0.05


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_zeros_have_finite_gradients(mesh, name, causal):
    layer = make_layer(mesh, CASES[name].settings, causal=causal)
    x = torch.zeros(2, 13, WIDTH, requires_grad=True)
    layer(x, places(13, causal=causal)).sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_folder_gives_the_same_model_back(mesh, name, tmp_path):
    settings = CASES[name].settings
    torch.manual_seed(0)
    model = CLIP(clip_config(settings), mesh)
    shapes = {key: tuple(value.shape) for key, value in to_open_clip(model).items()}
    assert shapes == open_clip_shapes(model.config, with_bias=False)
    export_folder(model, tmp_path / "hub")
    again = load_folder(tmp_path / "hub", mesh)
    assert again.config == model.config
    for (name, value), (_, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    written = json.loads((tmp_path / "hub" / CONFIG_FILE).read_text())["model_cfg"]["vision_cfg"]
    assert ("attention" in written) == (settings.kind != "softmax")


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_parameters_and_cost_are_known_without_a_model(mesh, name):
    config = clip_config(CASES[name].settings)
    built = sum(parameter.numel() for parameter in CLIP(config, mesh).parameters())
    assert num_parameters(config, LossConfig()) == built
    projections = 25 * 2 * 64**2 * (4 + 2 * config.vision.mlp_ratio)
    assert all(cost > projections for cost in blocks_flops(config.vision, 25))


def test_layers_may_have_different_kinds(mesh, tmp_path):
    config = clip_config(LinearAttention(normalized=True))
    config.vision.attention_by_layer = [LayerAttention(layers="-1:", attention=SoftmaxAttention())]
    model = CLIP(config, mesh)
    assert [block.attn.settings.kind for block in model.visual.blocks.values()] == [
        *("linear", "softmax")
    ]
    export_folder(model, tmp_path / "hub")
    assert load_folder(tmp_path / "hub", mesh).config == config
    assert config.vision.attention_text.endswith("layer 1: softmax")


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("0::2", [0, 2, 4]), ("-2:", [3, 4]), ("1", [1]), ("-1", [4]), (":", range(5))],
)
def test_layers_are_a_python_index_or_slice(layers, numbers):
    assert [*LayerAttention(layers=layers).numbers(5)] == [*numbers]


@pytest.mark.parametrize("layers", ["", "5", "-6", "5:", "a", "1:2:3:4", "0,1", "::0"])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers \('.*'\) must be an index or a slice of the 5"):
        LayerAttention(layers=layers).numbers(5)


@pytest.mark.parametrize(
    "name", [name for name in BIDIRECTIONAL if CASES[name].settings.needs_grid]
)
def test_a_layer_that_needs_the_grid_says_so(mesh, name):
    layer = make_layer(mesh, CASES[name].settings)
    with pytest.raises(ValueError, match=r"patches \(None\) must be given: attention \w+ \("):
        layer(torch.randn(1, 5, WIDTH))


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_a_layer_is_one_graph_and_has_shapes_without_memory(mesh, name, causal):
    layer = make_layer(mesh, CASES[name].settings, causal=causal)
    x, patches = torch.randn(2, 13, WIDTH), places(13, causal=causal)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert relative_rms(compiled(x, patches), layer(x, patches)) <= 1e-6
    o = layer.to("meta")(x.to("meta").requires_grad_(), patches)
    o.sum().backward()
    assert o.shape == x.shape

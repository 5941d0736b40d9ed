from collections.abc import Callable
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from open_clip.model import resize_pos_embed
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from ds_linclip.config import (
    Attention,
    LayerAttention,
    LinearAttention,
    MilaAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
)
from ds_linclip.model import CLIP
from ds_linclip.model.attention import Patches
from ds_linclip.model.block import Recompute
from ds_linclip.parallel.mesh import Mesh

ATTENTIONS = {
    "softmax": SoftmaxAttention(),
    "unnormalized": LinearAttention(),
    "length_exponent": LinearAttention(length_exponent=0.5, head_norm=True),
    "normalized": LinearAttention(normalized=True),
    "quadratic": LinearAttention(normalized=True, feature_map="quadratic"),
    "softplus": LinearAttention(feature_map="softplus", head_norm=True),
    "head_norm": LinearAttention(normalized=True, head_norm=True),
}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def small_config(attention: Attention, image_size: tuple[int, int] = (32, 32)) -> ModelConfig:
    return ModelConfig(
        embed_dim=24,
        vision=VisionTower(
            image_size=image_size,
            patch_size=8,
            width=64,
            layers=2,
            head_width=16,
            attention=attention,
        ),
        text=TextTower(
            context_length=12, vocab_size=60, width=48, heads=3, layers=2, attention=attention
        ),
    )


def build(
    mesh: Mesh, attention: Attention, seed: int = 0, image_size: tuple[int, int] = (32, 32)
) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(small_config(attention, image_size), mesh)


def inputs(
    batch: int = 4, seed: int = 1, image_size: tuple[int, int] = (32, 32)
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, *image_size, generator=generator)
    texts = torch.randint(1, 58, (batch, 12), generator=generator)
    texts[:, 7] = 59
    return images, texts


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.long
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_forward_returns_normalized_fp32_features_and_the_initial_scale(
    mesh: Mesh, kind: str
) -> None:
    model = build(mesh, ATTENTIONS[kind])
    image_features, text_features, log_scale = model(*inputs())
    assert image_features.shape == text_features.shape == (4, 24)
    torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(text_features.norm(dim=-1), torch.ones(4))
    assert log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_gradient_reaches_every_parameter(mesh: Mesh, kind: str) -> None:
    model = build(mesh, ATTENTIONS[kind])
    image_features, text_features, log_scale = model(*inputs())
    logits = log_scale.exp() * image_features @ text_features.T
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_bf16_weights_give_fp32_features_near_the_fp32_ones(mesh: Mesh) -> None:
    for kind in ("softmax", "normalized"):
        model = build(mesh, ATTENTIONS[kind])
        expected = model(*inputs())[:2]
        actual = model.bfloat16()(*inputs())[:2]
        for got, wanted in zip(actual, expected, strict=True):
            assert got.dtype == torch.float32
            assert relative_rms(got, wanted) < 3e-2


@pytest.mark.parametrize("kind", ["softmax", "normalized", "length_exponent"])
def test_fp32_weights_compute_in_bf16_as_under_autocast(mesh: Mesh, kind: str) -> None:
    model = build(mesh, ATTENTIONS[kind])
    expected = model(*inputs())[:2]
    model.compute_in(torch.bfloat16)
    dtypes = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            dtypes[name] = output.dtype

        return hook

    for name, module in model.named_modules():
        if name.endswith(("qkv", "out_proj", "c_fc", "c_proj", "conv1", "ln_1", "ln_post")):
            module.register_forward_hook(record(name))
    features = model(*inputs())[:2]
    for got, wanted in zip(features, expected, strict=True):
        assert got.dtype == torch.float32
        assert 1e-4 < relative_rms(got, wanted) < 3e-2
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if "ln_" in name else torch.bfloat16), name
    assert len(dtypes) == 4 * 4 + 1 + 4 + 1
    (features[0] @ features[1].T).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if name != "logit_scale"]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_attention_is_chosen_per_tower(mesh: Mesh) -> None:
    config = small_config(SoftmaxAttention())
    config.text.attention = LinearAttention(head_norm=True)
    model = CLIP(config, mesh)
    with_gain = [name for name, _ in model.named_parameters() if "head_norm" in name]
    assert with_gain == [f"text.blocks.{i}.attn.head_norm.weight" for i in range(2)]


def test_text_tower_is_causal_and_reads_the_end_of_text(mesh: Mesh) -> None:
    _, texts = inputs()
    changed = texts.clone()
    changed[:, 8:] = 5
    for attention in ATTENTIONS.values():
        model = build(mesh, attention)
        assert torch.equal(model.encode_text(texts), model.encode_text(changed))
        assert not torch.equal(model.encode_text(texts), model.encode_text(texts.roll(1, 0)))


def test_text_may_be_shorter_than_the_context(mesh: Mesh) -> None:
    model = build(mesh, SoftmaxAttention())
    _, texts = inputs()
    torch.testing.assert_close(model.encode_text(texts[:, :8]), model.encode_text(texts))


def test_weights_depend_on_the_seed_alone(mesh: Mesh) -> None:
    first, again = build(mesh, LinearAttention(), seed=3), build(mesh, LinearAttention(), seed=3)
    other = build(mesh, LinearAttention(), seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.visual.proj, other.visual.proj)


@pytest.mark.parametrize("drops_patches", [False, True])
@pytest.mark.parametrize("needs_grid", [False, True])
def test_pipeline_stages_compute_what_the_whole_model_does(
    mesh: Mesh, needs_grid: bool, drops_patches: bool
) -> None:
    """The last layer of the image tower needs the grid; those before it pass it on."""
    config = small_config(LinearAttention(), (32, 48))
    if needs_grid:
        config.vision.attention_by_layer = [LayerAttention(layers="-1", attention=MilaAttention())]
    kept = [torch.tensor([[0, 1, 5, 6, 9, 11, 16, 22]] * 4)] if drops_patches else []
    units = range(CLIP.num_units(config))
    stages = []
    for held in [units, *(range(unit, unit + 1) for unit in units)]:
        torch.manual_seed(0)
        stages.append(CLIP(config, mesh, units=held))
    whole, *parts = stages
    expected = whole(*inputs(image_size=(32, 48)), *kept)
    found = *inputs(image_size=(32, 48)), *kept
    for part in parts:
        found = part(*found)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_attention_kind_changes_no_initial_weight(mesh: Mesh) -> None:
    linear, softmax = build(mesh, LinearAttention(head_norm=True)), build(mesh, SoftmaxAttention())
    for name, value in softmax.state_dict().items():
        assert torch.equal(value, linear.state_dict()[name]), name


def test_state_dict_holds_tensors_only_and_loads_back(mesh: Mesh) -> None:
    model = build(mesh, LinearAttention(), seed=0)
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    build(mesh, LinearAttention(), seed=1).load_state_dict(state)


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (64, 8)])
def test_tokens_of_a_batch_are_those_the_towers_see(mesh: Mesh, size: tuple[int, int]) -> None:
    model = build(mesh, LinearAttention())
    seen = []
    for block in (model.visual.blocks["0"], model.text.blocks["0"]):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    images, texts = inputs(3, image_size=size)
    texts = texts[:, :9]
    model(images, texts)
    assert model.num_tokens(images, texts) == sum(seen)


def test_positions_are_untouched_at_the_configured_size(mesh: Mesh) -> None:
    visual = build(mesh, LinearAttention()).visual
    assert visual._positions(4, 4) is visual.positional_embedding


def test_positions_are_resampled_to_other_grids(mesh: Mesh) -> None:
    visual = build(mesh, LinearAttention()).visual
    column = torch.arange(4.0).repeat(4)  # the column of each patch, in row-major order
    with torch.no_grad():
        visual.positional_embedding[1:] = column[:, None]
        positions = visual._positions(3, 8)
    assert torch.equal(positions[0], visual.positional_embedding[0])
    grid = positions[1:].unflatten(0, (3, 8))
    torch.testing.assert_close(grid, grid[:1].expand_as(grid))  # no change from row to row
    assert (grid[0, 1:, 0] > grid[0, :-1, 0]).all()
    torch.testing.assert_close(grid[0, 3:5, 0].mean().item(), 1.5)  # centre stays centre


@pytest.mark.parametrize("size", [(64, 64), (16, 40)])
def test_images_of_other_sizes_train(mesh: Mesh, size: tuple[int, int]) -> None:
    model = build(mesh, LinearAttention())
    features = model.encode_image(torch.randn(2, 3, *size))
    features.square().sum().backward()
    assert features.shape == (2, 24)
    assert model.visual.positional_embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["softmax", "head_norm"])
def test_model_of_a_wide_image_trains(mesh: Mesh, kind: str) -> None:
    model = build(mesh, ATTENTIONS[kind], image_size=(16, 48))
    assert model.visual.grid_size == (2, 6)
    assert model.visual.positional_embedding.shape == (2 * 6 + 1, 64)
    image_features, text_features, log_scale = model(*inputs(image_size=(16, 48)))
    assert image_features.shape == text_features.shape == (4, 24)
    logits = log_scale.exp() * image_features @ text_features.T
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_grid_is_rows_by_columns_and_not_its_transpose(mesh: Mesh) -> None:
    """A 6 x 2 and a 2 x 6 grid have as many positions: only one of them is left as it is."""
    visual = build(mesh, LinearAttention(), image_size=(16, 48)).visual
    assert visual._positions(2, 6) is visual.positional_embedding
    assert not torch.equal(visual._positions(6, 2), visual.positional_embedding)


def test_every_patch_has_the_position_of_its_place(mesh: Mesh) -> None:
    """Row-major, class token first: with content switched off, what enters the first block."""
    visual = build(mesh, LinearAttention(), image_size=(16, 24)).visual
    nn.init.zeros_(visual.conv1.weight)
    nn.init.zeros_(visual.class_embedding)
    visual.ln_pre = nn.Identity()
    with torch.no_grad():
        visual.positional_embedding[:, 0] = torch.arange(7.0)
        visual.conv1.weight[1] = 1 / (3 * 8 * 8)  # feature 1: the mean of the patch
    entered: list[torch.Tensor] = []
    visual.blocks["0"].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    images = torch.zeros(1, 3, 16, 24)
    images[:, :, 8:, :8] = 1000.0  # second row, first column: place 3 of a row-major grid
    visual(images)
    assert entered[0][0, :, 0].tolist() == list(range(7))
    assert entered[0][0, :, 1].argmax().item() == 1 + 3


@pytest.mark.parametrize("learned", [(32, 32), (16, 48), (48, 24)])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 48), (24, 56), (64, 8)])
@torch.no_grad()
def test_same_weights_serve_every_size(
    mesh: Mesh, learned: tuple[int, int], size: tuple[int, int]
) -> None:
    """The features are those of a model configured for the size, its positions interpolated by
    torch's upsampling of an [H, W] picture per feature."""
    model = build(mesh, ATTENTIONS["normalized"], image_size=learned)
    target = build(mesh, ATTENTIONS["normalized"], seed=1, image_size=size)
    rows, columns = learned[0] // 8, learned[1] // 8
    positions = model.visual.positional_embedding
    picture = torch.empty(1, 64, rows, columns)
    for row in range(rows):
        for column in range(columns):
            picture[0, :, row, column] = positions[1 + row * columns + column]
    if learned != size:
        resample = nn.functional.interpolate
        picture = resample(picture, (size[0] // 8, size[1] // 8), mode="bicubic", antialias=True)
    grid = [(row, column) for row in range(size[0] // 8) for column in range(size[1] // 8)]
    places = [picture[0, :, row, column] for row, column in grid]
    state = model.state_dict() | {
        "visual.positional_embedding": torch.stack([positions[0], *places])
    }
    target.load_state_dict(state)
    images, _ = inputs(image_size=size)
    assert relative_rms(model.encode_image(images), target.encode_image(images)) <= 1e-5


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (24, 56)])
@torch.no_grad()
def test_positions_are_resampled_as_open_clip_does(mesh: Mesh, size: tuple[int, int]) -> None:
    """open_clip resamples square grids when it loads weights."""
    model = build(mesh, LinearAttention())
    theirs = build(mesh, LinearAttention(), image_size=size)
    weights = {"visual.positional_embedding": model.visual.positional_embedding}
    resize_pos_embed(weights, theirs)
    positions = model.visual._positions(size[0] // 8, size[1] // 8)
    assert relative_rms(positions, weights["visual.positional_embedding"]) <= 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 32, 33), (2, 1, 32, 32), (3, 32, 32), (2, 3, 0, 32)])
def test_image_of_a_wrong_shape_is_named(mesh: Mesh, shape: tuple[int, ...]) -> None:
    model = build(mesh, LinearAttention())
    with pytest.raises(ValueError, match=r"images \(.*\) must have shape .* patch_size \(8\)"):
        model.encode_image(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 13), (12,)])
def test_text_of_a_wrong_shape_is_named(mesh: Mesh, shape: tuple[int, ...]) -> None:
    model = build(mesh, LinearAttention())
    with pytest.raises(ValueError, match=r"texts \(.*\) must have shape .* context_length \(12\)"):
        model.encode_text(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_blocks_are_compiled_also_under_activation_checkpointing(
    mesh: Mesh, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the compiler: what it gives is what runs, forward and again in backward."""
    calls: list[torch.Size] = []

    def compiled(fn):
        def run(x: torch.Tensor, patches: Patches | None) -> torch.Tensor:
            calls.append(x.shape)
            return fn(x, patches)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    model = build(mesh, LinearAttention())
    model.recompute_activations(recompute)
    model.compile_blocks()
    model.encode_image(inputs()[0]).sum().backward()
    assert len(calls) == 2 * (2 if recompute == "full" else 1)


class Graphs:
    """A backend that runs the graphs as they are and keeps them: forwards and backwards."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def compile(self, model: CLIP) -> CLIP:
        torch.compiler.reset()
        counters.clear()
        backend = aot_autograd(
            fw_compiler=partial(self._keep, self.forward),
            bw_compiler=partial(self._keep, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        model.compile_towers(fullgraph=True, dynamic=False, backend=backend)
        return model

    @staticmethod
    def _keep(kept: list[torch.fx.GraphModule], graph: torch.fx.GraphModule, _: object) -> object:
        kept.append(graph)
        return make_boxed_func(graph.forward)

    @staticmethod
    def count(graph: torch.fx.GraphModule, operator: str) -> int:
        return sum(str(node.target) == f"linclip.{operator}.default" for node in graph.graph.nodes)


def gradients(model: CLIP, *more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    outputs = model(*inputs(), *more)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    assert isinstance(total, torch.Tensor)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize(("recompute", "repeated"), [("none", 0), ("selective", 0), ("full", 3)])
def test_both_towers_are_one_graph_forward_and_one_backward(
    mesh: Mesh, recompute: Recompute, repeated: int
) -> None:
    """The operator of the four blocks is in them, and repeated only where the backward recomputes
    it; patches are dropped and a part is frozen."""
    kept = torch.arange(0, 16, 2).expand(4, 8).contiguous()
    found = []
    graphs = Graphs()
    for is_compiled in (False, True):
        model = build(mesh, LinearAttention())
        model.recompute_activations(recompute)
        model.text.lock(2)
        if is_compiled:
            graphs.compile(model)
        found.append(gradients(model, kept))
    expected, compiled = found
    assert compiled.keys() == expected.keys()
    assert all(torch.equal(compiled[name], value) for name, value in expected.items())
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert graphs.count(forward, "linear_attention_packed") == 4
    assert graphs.count(backward, "sum_rows") == 1  # of image positions; the others are frozen
    # The first block of texts is frozen.
    assert graphs.count(backward, "linear_attention_packed_backward") == 3
    assert graphs.count(backward, "linear_attention_packed") == repeated


@pytest.mark.long
def test_compiled_towers_are_not_what_evaluation_runs(mesh: Mesh) -> None:
    """Its batches have many sizes, each of which would be compiled."""
    graphs = Graphs()
    model, plain = graphs.compile(build(mesh, LinearAttention())), build(mesh, LinearAttention())
    with torch.no_grad():
        for batch in range(1, 12):
            images, texts = inputs(batch)
            assert torch.equal(model.encode_image(images), plain.encode_image(images))
            assert torch.equal(model.encode_text(texts), plain.encode_text(texts))
    assert not graphs.forward

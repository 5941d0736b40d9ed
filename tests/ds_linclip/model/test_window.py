"""Windows: softmax attention where they cover everything, tiles against a loop over tokens."""

from functools import partial

import pytest
import torch
from torch import Tensor

from ds_linclip.config import SoftmaxAttention, WindowAttention
from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.model.attention.window import _Window
from ds_linclip.parallel.mesh import Mesh
from helpers import attention_layers
from helpers.attention_definitions import window
from linclip_kernels.linear_attention.reference import relative_rms

WIDTH, HEADS = 32, 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


make_layer = partial(attention_layers.make_layer, width=WIDTH, heads=HEADS)


@pytest.mark.parametrize(
    ("settings", "patches", "num_tokens"),
    [
        (WindowAttention(size=77), None, 77),
        (WindowAttention(size=300), None, 77),
        (WindowAttention(size=1), None, 1),
        (WindowAttention(radius=13), Patches(14, 14), 197),
        (WindowAttention(radius=5), Patches(2, 6), 13),
        (WindowAttention(radius=0), Patches(1, 1), 2),
        (WindowAttention(radius=0), Patches(0, 0), 1),
        (WindowAttention(radius=3), Patches(4, 4, torch.tensor([[0, 3, 15], [5, 6, 7]])), 4),
    ],
)
def test_a_window_over_everything_has_the_bits_of_softmax(mesh, settings, patches, num_tokens):
    causal = patches is None
    x = torch.randn(2, num_tokens, WIDTH)
    found = make_layer(mesh, settings, causal=causal)(x, patches)
    assert torch.equal(found, make_layer(mesh, SoftmaxAttention(), causal=causal)(x))


@pytest.mark.parametrize(
    ("settings", "patches", "num_tokens"),
    [
        (WindowAttention(size=1), None, 200),
        (WindowAttention(size=7), None, 193),
        (WindowAttention(size=70), None, 640),
        (WindowAttention(radius=1), Patches(24, 17), 409),
        (WindowAttention(radius=0), Patches(3, 120), 361),
        (WindowAttention(radius=3), Patches(24, 25), 601),
    ],
)
def test_tiles_are_a_loop_over_tokens(mesh, settings, patches, num_tokens, monkeypatch):
    layer = make_layer(mesh, settings, causal=patches is None).double()
    x = torch.randn(1, num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(_Window, "mask", fail)
    found = run(layer, x, patches)
    monkeypatch.undo()
    for each, expected in zip(found, run(layer, x, patches, loop=True), strict=True):
        assert relative_rms(each, expected) <= 1e-12


def run(layer: SelfAttention, x: Tensor, patches: Patches | None, *, loop: bool = False) -> object:
    """Return what enters the output projection, and gradients."""
    o = window(layer, x, patches) if loop else layer.attend(*layer.prepare(x, patches))
    grad = torch.ones_like(o) + torch.arange(o.numel()).view(o.shape) % 7
    return o, *torch.autograd.grad(o, [x, layer.qkv.weight, layer.qkv.bias], grad)


def fail(*_: object) -> None:
    raise AssertionError("a mask over all tokens")


def test_few_tokens_and_dropped_patches_need_a_mask(mesh, monkeypatch):
    layer = make_layer(mesh, WindowAttention(), causal=False)
    monkeypatch.setattr(_Window, "attend_in_tiles", fail)
    layer(torch.randn(1, 197, WIDTH), Patches(14, 14))
    layer(torch.randn(1, 401, WIDTH), Patches(32, 32, torch.arange(400)[None]))
    with pytest.raises(AssertionError, match="a mask over all tokens"):
        layer(torch.randn(1, 1025, WIDTH), Patches(32, 32))


def test_tiles_take_memory_of_the_tokens(mesh):
    layer = make_layer(mesh, WindowAttention(radius=1), causal=False).to("meta")
    sizes = []
    for side in (64, 128):
        x = torch.empty(1, 1 + side**2, WIDTH, device="meta", requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            layer(x, Patches(side, side)).sum().backward()
        sizes.append(sum(saved))
    assert sizes[1] < 4.1 * sizes[0]


@pytest.mark.parametrize(
    ("num_tokens", "causal", "num_keys"),
    [(20, True, 20), (200, True, 32), (40, False, 40), (197, False, 51)],
)
def test_a_token_costs_what_it_sees(num_tokens, causal, num_keys):
    kind = attention_class(WindowAttention())
    assert kind.flops(WindowAttention(), 16, num_tokens, causal=causal) == 4 * 16 * num_keys


def test_values_of_text_far_away_change_nothing(mesh):
    layer = make_layer(mesh, WindowAttention(size=32), causal=True)
    x = torch.randn(1, 300, WIDTH)
    changed = x.clone()
    changed[:, 100] = 1000
    is_changed = (layer(x) != layer(changed)).any(-1)[0]
    assert is_changed.nonzero().flatten().tolist() == [*range(100, 132)]


@pytest.mark.parametrize(("num_tokens", "patches"), [(200, None), (409, Patches(24, 17))])
def test_bfloat16_is_near_single_precision(mesh, num_tokens, patches):
    layer = make_layer(mesh, WindowAttention(size=5, radius=1), causal=patches is None)
    x = torch.randn(1, num_tokens, WIDTH)
    expected = layer(x, patches)
    found = layer.bfloat16()(x.bfloat16(), patches)
    assert relative_rms(found, expected) <= 0.02

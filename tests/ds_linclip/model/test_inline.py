"""InLine attention and its predicted local part: known values and what cancels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_linclip.config import InlineAttention, PredictedLocal
from ds_linclip.model.attention import Patches, attention_class
from ds_linclip.parallel.mesh import Mesh
from helpers import attention_layers
from linclip_kernels.linear_attention.reference import relative_rms


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def make_layer(
    mesh: Mesh, width: int = 64, heads: int = 4, *, causal: bool = False, **settings: Any
) -> Any:
    made = InlineAttention(**settings)
    return attention_layers.make_layer(mesh, made, causal=causal, width=width, heads=heads)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)  # [B, N, H, D]


def test_two_keys_have_the_known_output(mesh):
    layer = make_layer(mesh, 1, 1)
    o = layer.attend(column(2, 0), column(1, -1), column(0, 1))
    # Scores 2 and -2 have the mean 0: weights (1 + 2) / 2 and (1 - 2) / 2.
    assert o.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_a_row_sum_to_one_and_may_be_negative(mesh, causal):
    layer = make_layer(mesh, causal=causal).double()
    weights = layer.weights(3 * torch.randn(2, 20, 64, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights.min() < 0


@pytest.mark.parametrize("causal", [False, True])
def test_what_all_keys_have_in_common_cancels(mesh, causal):
    layer = make_layer(mesh, causal=causal)
    q, k, v = torch.randn(3, 1, 197, 4, 16).unbind()
    shift = 50 * torch.randn(4, 16)
    exact = layer.attend(q.double(), k.double(), v.double())
    assert relative_rms(layer.attend(q, k + shift, v), exact) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_token_of_a_text_has_its_own_value(mesh, dtype):
    layer = make_layer(mesh, causal=True)
    q, k, v = (100 * torch.randn(3, 2, 9, 4, 16)).to(dtype).unbind()
    assert torch.equal(layer.attend(q, k, v)[:, 0], v[:, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_near_single_precision_though_keys_have_a_mean(mesh, causal):
    layer = make_layer(mesh, causal=causal)
    q, k, v = torch.randn(3, 2, 77, 4, 16).bfloat16().unbind()
    k = k + 4
    exact = layer.attend(q.double(), k.double(), v.double())
    assert relative_rms(layer.attend(q, k, v), exact) <= 1e-2


def predicted(mesh: Mesh, *, causal: bool, taps: list[float]) -> Any:
    """Return a layer whose predicted weights are ``taps``, whatever the input."""
    layer = make_layer(mesh, causal=causal, local=PredictedLocal())
    layer.start_from_softmax()
    with torch.no_grad():
        layer.local_taps_bias.copy_(torch.tensor(taps).repeat(64))
    return layer


@pytest.mark.parametrize("causal", [False, True])
def test_known_weights_give_the_known_residual(mesh, causal):
    patches = None if causal else Patches(3, 4)
    x, o = torch.randn(2, 13, 64), torch.randn(2, 13, 4, 16)
    _, _, v = make_layer(mesh, causal=causal).project(x)
    num_taps = 3 if causal else 9
    nothing = predicted(mesh, causal=causal, taps=[0.0] * num_taps)
    assert torch.equal(nothing.finish(o, x, v, patches), o)
    centre = [float(tap == (2 if causal else 4)) for tap in range(num_taps)]
    itself = predicted(mesh, causal=causal, taps=centre).finish(o, x, v, patches)
    expected = o + v
    if not causal:
        expected[:, 0] = o[:, 0]  # the class token has no residual
    torch.testing.assert_close(itself, expected)


def test_the_class_token_is_part_of_the_mean(mesh):
    layer = make_layer(mesh, local=PredictedLocal())
    x, o = torch.randn(2, 13, 64), torch.zeros(2, 13, 4, 16)
    _, _, v = layer.project(x)
    changed = x.clone()
    changed[:, 0] += 10
    before, after = (layer.finish(o, each, v, Patches(3, 4)) for each in (x, changed))
    assert not torch.equal(before[:, 1:], after[:, 1:])
    assert not before[:, 0].any()


def test_the_predicted_part_has_the_size_that_the_paper_gives_it():
    settings = InlineAttention(local=PredictedLocal())
    shapes = attention_class(settings).own_shapes(settings, 768, 12, causal=False)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 499_200

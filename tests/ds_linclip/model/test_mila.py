"""MILA's linear attention: weights known from the angles between places."""

import pytest
import torch
from torch import Tensor

from ds_linclip.config import MilaAttention
from ds_linclip.model.attention import Patches
from helpers.attention_layers import identity_layer

SIZE = 16


def weights(
    base: float, x: Tensor, patches: Patches | None = None, *, causal: bool = False
) -> Tensor:
    """Return the weights [B, N, N] of one head."""
    layer = identity_layer(MilaAttention(rotation_base=base), SIZE, causal=causal)
    return layer.weights(x.double(), patches)[:, 0]


def test_equal_tokens_of_a_text_are_weighted_by_the_cosine_of_their_distance():
    position = torch.arange(9.0, dtype=torch.float64)
    cosines = (position[:, None] - position).cos().tril() / (1 + position[:, None])
    assert weights(1.0, torch.zeros(1, 9, SIZE), causal=True)[0].allclose(cosines, atol=1e-14)


def test_half_of_the_pairs_turn_by_the_row_and_half_by_the_column():
    place = torch.tensor([[0, 0], *([r, c] for r in range(2) for c in range(3))]).double()
    turns = place[:, None] - place  # [7, 7, 2]; the class token has the place of the first patch
    found = weights(1.0, torch.zeros(1, 7, SIZE), Patches(2, 3))
    assert found[0].allclose(turns.cos().mean(-1) / 7, atol=1e-14)


def test_pairs_turn_at_their_own_speed():
    # Four pairs of rows turn by 1, 1/10, 1/100, 1/1000 per row.
    speeds = 10.0 ** -torch.arange(4).double()
    found = weights(10.0**4, torch.zeros(1, 3, SIZE), Patches(2, 1))
    expected = (speeds.cos().mean() + 1) / 2 / 3
    assert found[0, 2, 1].item() == pytest.approx(expected.item(), rel=1e-14)


def test_only_the_numerator_turns():
    x = torch.randn(2, 7, SIZE, generator=torch.Generator().manual_seed(0)).double()
    features = torch.where(x > 0, x + 1, x.exp())
    score = features @ features.mT
    still = weights(1.0, x[:, :1], Patches(1, 1, torch.empty(2, 0, dtype=torch.int64)))
    assert still.allclose(torch.ones_like(still))
    found = weights(1.0, x, Patches(2, 3))
    # A patch and itself have no angle between them.
    own = (score / score.sum(-1, keepdim=True)).diagonal(dim1=1, dim2=2)
    assert found.diagonal(dim1=1, dim2=2).allclose(own, rtol=1e-12)
    assert not found.sum(-1).allclose(torch.ones(2, 7, dtype=torch.float64), atol=0.01)


def test_kept_patches_keep_their_places():
    x = torch.randn(1, 7, SIZE, generator=torch.Generator().manual_seed(0)).double()
    whole = weights(100.0, x, Patches(2, 3))
    kept = torch.tensor([[1, 2, 5]])
    tokens = [0, 2, 3, 6]
    found = weights(100.0, x[:, tokens], Patches(2, 3, kept))
    ratio = found[0] / whole[0, tokens][:, tokens]  # Only the denominators differ, by row.
    assert ratio.allclose(ratio[:, :1].expand(4, 4), rtol=1e-10)


def test_very_negative_features_are_finite():
    layer = identity_layer(MilaAttention(), SIZE, causal=True).float()
    x = torch.full((1, 3, SIZE), -1000.0, requires_grad=True)
    o = layer(x)
    (grad,) = torch.autograd.grad(o.sum(), x)
    assert o.isfinite().all()
    assert grad.isfinite().all()

"""What attention with learned features does beside its definition: memory and extremes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_linclip.config import HedgehogAttention, LunaAttention
from ds_linclip.model.attention import SelfAttention, luna
from ds_linclip.parallel.mesh import Mesh
from helpers import attention_layers
from linclip_kernels.linear_attention.reference import relative_rms

WIDTH, HEADS = 64, 4
KINDS = {"luna": LunaAttention(), "hedgehog": HedgehogAttention()}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def make_layer(mesh: Mesh, kind: str, *, causal: bool = False) -> Any:
    return attention_layers.make_layer(mesh, KINDS[kind], causal=causal, is_trained=True)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.num = max(self.num, *sizes) if sizes else self.num
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_intermediate_results_of_the_map_are_not_kept(mesh, kind):
    layer, x = make_layer(mesh, kind), torch.randn(2, 50, WIDTH)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x.requires_grad_())
    parameters = sum(p.numel() for p in layer.parameters())
    tokens = x.numel()
    features = 2 * tokens // layer.head_dim * type(layer).num_features(KINDS[kind], layer.head_dim)
    # The input; q, k, v; the features of q and k; the output of attention; its state.
    assert sum(kept.values()) <= parameters + 5 * tokens + features + 2 * HEADS * 65 * 17


def test_the_hidden_layer_of_luna_is_computed_in_parts(mesh, monkeypatch):
    results = []
    for most in (2**24, 2**15):
        monkeypatch.setattr(luna, "_MAX_HIDDEN", most)
        layer = make_layer(mesh, "luna").double()
        x = torch.randn(2, 50, WIDTH, dtype=torch.float64, requires_grad=True)
        with Largest() as largest:
            out = layer(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        results.append([out, *gradients])
        assert largest.num <= most
    assert largest.num >= 2**14
    for found, expected in zip(*results, strict=True):
        assert relative_rms(found, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows_have_finite_outputs_and_gradients(mesh, kind, causal, dtype):
    layer = make_layer(mesh, kind, causal=causal).to(dtype)
    x = torch.randn(2, 9, WIDTH, dtype=dtype)
    x[0, ::2], x[1, 1::2] = 0, 1e4
    assert_finite(layer, x)
    assert_finite(layer, torch.zeros_like(x))
    assert_finite(layer, 1e4 * torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_features_have_finite_outputs_and_gradients(mesh, causal, dtype):
    layer = make_layer(mesh, "luna", causal=causal).to(dtype)
    nn.init.constant_(layer.channel_bias, -200)
    x = torch.randn(2, 9, WIDTH, dtype=dtype)
    phi, _ = layer.features(*layer.project(x)[:2], dtype=dtype)
    assert not phi.any()
    assert_finite(layer, x)
    assert not (layer(x) - layer.out_proj.bias).any()


def assert_finite(layer: SelfAttention, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    out = layer(x)
    gradients = torch.autograd.grad(out.float().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(each).all() for each in (out, *gradients))

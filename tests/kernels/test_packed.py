"""The operator on a packed qkv: the same bits as on q, k and v, and one packed gradient."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.kernel_checks import (
    MAP_VARIANTS,
    VARIANTS,
    check_packed_matches_plain,
    check_transforms,
    make_inputs,
)
from linclip_kernels import linear_attention_packed
from linclip_kernels.linear_attention.variant import Variant

ALL = {**VARIANTS, **MAP_VARIANTS}
SOME = ["eq7", "causal-eq4", "centered", "causal-centered"]


def make_qkv(num_tokens: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs, _ = make_inputs((batch, num_tokens, 2, 16, 16), dtype, packed=True)
    return torch.stack([x.detach() for x in inputs], 3).requires_grad_()


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_with_three_tensors(variant: str, dtype: torch.dtype) -> None:
    check_packed_matches_plain(ALL[variant], dtype, "torch", "cpu", num_tokens=150)


@pytest.mark.parametrize("variant", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_of_several_sequences(variant: str, dtype: torch.dtype) -> None:
    boundaries = [0, 70, 70, 71, 150]
    check_packed_matches_plain(ALL[variant], dtype, "torch", "cpu", cu_seqlens=boundaries)


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


def test_backward_stacks_nothing() -> None:
    """The backward is the operator, and nothing that copies."""
    qkv = make_qkv(20)
    out = linear_attention_packed(qkv)
    grad = torch.ones_like(out)
    with Operators() as ran:
        torch.autograd.grad(out, qkv, grad)
    copies = {"aten::stack", "aten::cat", "aten::clone", "aten::copy_", "aten::add"}
    assert "linclip::linear_attention_packed_backward" in ran.names
    assert not copies & set(ran.names)


@pytest.mark.parametrize("variant", [*SOME, "eq4-quadratic"])
def test_transforms_of_torch_func(variant: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention_packed(torch.stack([q, k, v], 3), **ALL[variant])

    check_transforms(attend, "cpu")


@pytest.mark.parametrize("variant", SOME)
def test_compiles_to_one_graph(variant: str) -> None:
    def attend(qkv: Tensor) -> Tensor:
        return linear_attention_packed(qkv, **ALL[variant]) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    qkv = make_qkv(77)
    grad = torch.randn_like(qkv[:, :, :, 0])
    results = []
    for function in (attend, compiled):
        out = function(qkv)
        results.append([out.detach(), *torch.autograd.grad(out, qkv, grad)])
    assert all(map(torch.equal, *results))


def test_second_derivative_is_refused() -> None:
    qkv = make_qkv(9)
    out = linear_attention_packed(qkv)
    grad = torch.ones_like(out).requires_grad_()
    (d_qkv,) = torch.autograd.grad(out, qkv, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        d_qkv.sum().backward()


def test_autocast_casts_it() -> None:
    qkv = make_qkv(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention_packed(qkv)
    assert torch.equal(out, linear_attention_packed(qkv.bfloat16()))
    assert torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32


def test_operators_are_registered_as_torch_wants_them() -> None:
    qkv = make_qkv(20, batch=1).detach()
    boundaries, options = torch.tensor([0, 5, 20]), Variant(causal=True, normalized=True)
    packed = torch.ops.linclip.linear_attention_packed
    torch.library.opcheck(packed, (qkv, None, boundaries, *options, True, False))
    out, state = packed(qkv, None, boundaries, *options, True, False)
    arguments = qkv, None, boundaries, None, out, state, *options, False
    torch.library.opcheck(torch.ops.linclip.linear_attention_packed_backward, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": [1.0]}, "qkv (list) must be a torch.Tensor"),
        (
            {"qkv": torch.zeros(2, 5, 3, 2, 16)},
            "qkv.shape (2, 5, 3, 2, 16) must be [B, N, H, 3, D]",
        ),
        (
            {"qkv": torch.zeros(2, 0, 2, 3, 16)},
            "qkv.shape (2, 0, 2, 3, 16) must be [B, N, H, 3, D]",
        ),
        ({"qkv": torch.zeros(2, 5, 2, 3, 16).int()}, "qkv.dtype (torch.int32) must be a floating"),
        ({"feature_map": "elu"}, "feature_map ('elu') must be one of affine, quadratic"),
        ({"feature_map": "relu", "centered": True}, "feature_map ('relu') must be 'affine' when"),
        ({"cu_seqlens": [0, 5]}, "q.shape[0] (2) must be 1 when cu_seqlens is given"),
        (
            {"initial_state": torch.zeros(2, 2, 16, 17)},
            "initial_state.shape (2, 2, 16, 17) must be",
        ),
        ({"backend": "triton", "qkv": torch.zeros(2, 5, 2, 3, 8)}, "qkv.shape[-1] (8) must be in"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"qkv": torch.zeros(2, 5, 2, 3, 16)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention_packed(**arguments)

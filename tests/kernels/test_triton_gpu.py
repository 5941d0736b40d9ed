"""The Triton kernels on a CUDA device: the interpreter's cases, and those that need a device."""

import pytest
import torch
from triton_cases import *  # noqa: F403

from helpers.kernel_checks import (
    VARIANTS,
    check_against_definition,
    make_inputs,
    relative_rms,
    with_gradients,
)
from linclip_kernels import linear_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


FORMULAS = ["eq7", "eq4", "causal-eq7", "causal-eq4", "centered", "causal-centered"]


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_thousand_tokens(variant: str, dtype: torch.dtype) -> None:
    inputs, grad = make_inputs((1, 4096, 4, 64, 64), dtype, device="cuda")
    check_against_definition(inputs, grad, "triton", **VARIANTS[variant])


@pytest.mark.parametrize("variant", [*FORMULAS, "causal-eq7-alpha"])
@pytest.mark.parametrize("num_tokens", [77, 197, 2000])
def test_cuda_graph_replays_new_inputs(variant: str, num_tokens: int) -> None:
    inputs, grad = make_inputs((2, num_tokens, 3, 64, 64), torch.bfloat16, device="cuda")
    others, _ = make_inputs((2, num_tokens, 3, 64, 64), torch.bfloat16, device="cuda", seed=1)
    for _ in range(3):  # compiled and warm before the capture
        with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    assert all(map(torch.equal, captured, expected))


def test_cuda_graph_refuses_boundaries() -> None:
    (q, k, v), _ = make_inputs((1, 77, 3, 64, 64), torch.bfloat16, device="cuda")
    with (
        pytest.raises(RuntimeError, match="cu_seqlens cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 77]))


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4"])
def test_inductor_compiles_around_the_operator(variant: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, **VARIANTS[variant]).square()

    inputs, grad = make_inputs((2, 197, 3, 64, 64), torch.bfloat16, device="cuda")
    plain = with_gradients(attend, inputs, grad)
    compiled = with_gradients(torch.compile(attend, fullgraph=True), inputs, grad)
    for value, expected in zip(compiled, plain, strict=True):
        assert relative_rms(value, expected.double()) < 1e-2


@pytest.mark.parametrize("variant", ["eq7", "causal-eq7"])
def test_offsets_beyond_32_bits(variant: str) -> None:
    """A packed qkv of more than 2^31 elements: the last head against the same head alone."""
    num_tokens, heads, dim = 720_000, 16, 64
    qkv = torch.randn(1, num_tokens, heads, 3, dim, dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 2**31
    options = {**VARIANTS[variant], "length_exponent": 1.0}
    qkv.requires_grad_()
    out = linear_attention(*qkv.unbind(3), **options)
    out[:, :, -1].square().mean().backward()
    alone = qkv.detach()[:, :, -1:].clone().requires_grad_()
    expected = linear_attention(*alone.unbind(3), backend="torch", **options)
    expected.square().mean().backward()
    assert alone.grad is not None
    assert qkv.grad is not None
    assert relative_rms(out[:, :, -1:], expected.double()) < 1e-2
    assert relative_rms(qkv.grad[:, :, -1:], alone.grad.double()) < 2e-2
    assert not qkv.grad[:, :, :-1].any()

"""The gated delta rule against a loop over tokens in float64, and against values known by hand."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_linclip.model.recurrences import gated_delta_rule
from ds_linclip.model.recurrences.gated_delta_rule import _fla
from linclip_kernels.linear_attention.reference import relative_rms

#: Relative RMS of output and gradients, computed from inputs that the dtype represents.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2**-8}


def definition(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3])  # [B, H, Dk, Dv]
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        old = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - old)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1)


def arguments(
    num_tokens: int, *, dtype: torch.dtype = torch.float64, dims: tuple[int, int] = (16, 24)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, num_tokens, 3, *shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(dims[0]), F.normalize(normal(dims[0]), dim=-1), normal(dims[1])
    gates = [normal().sigmoid(), -F.softplus(normal() - 2)]
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *gates)]


def output_and_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    o = function(*inputs)
    # In bfloat16 first, so that every dtype has the same.
    weights = torch.linspace(-1, 1, o.numel()).view(o.shape).bfloat16()
    return [o, *torch.autograd.grad(o, inputs, weights.to(o.dtype))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 63, 64, 65, 77, 197])
def test_output_and_gradients_are_those_of_the_definition(num_tokens, dtype):
    inputs = arguments(num_tokens, dtype=dtype)
    found = output_and_gradients(gated_delta_rule, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for x, y in zip(found, output_and_gradients(definition, exact), strict=True):
        assert x.dtype == dtype
        assert relative_rms(x, y) <= TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 200])
def test_the_chunk_size_changes_rounding_only(chunk_size):
    inputs = arguments(77)
    found = gated_delta_rule(*inputs, chunk_size=chunk_size)
    assert relative_rms(found, definition(*inputs)) <= 1e-12


def test_a_decay_to_nothing_costs_no_precision():
    *inputs, log_decay = arguments(130, dtype=torch.float32)
    resets = torch.arange(130).view(1, 130, 1) % 9 == 8
    log_decay = torch.where(resets, -1000, log_decay).detach().requires_grad_()
    inputs = [*inputs, log_decay]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = output_and_gradients(gated_delta_rule, inputs)
    for x, y in zip(found, output_and_gradients(definition, exact), strict=True):
        assert relative_rms(x, y) <= TOLERANCE[torch.float32]


def test_orthonormal_keys_return_their_values():
    k = torch.eye(16, dtype=torch.float64).view(1, 16, 1, 16)
    v = torch.randn(1, 16, 1, 5, dtype=torch.float64)
    ones = torch.ones(1, 16, 1, dtype=torch.float64)
    o = gated_delta_rule(k, k, v, ones, 0 * ones, chunk_size=5)
    torch.testing.assert_close(o, v, rtol=0, atol=1e-15)
    # All keys are still there at the last token.
    q = torch.ones(1, 16, 1, 16, dtype=torch.float64)
    o = gated_delta_rule(q, k, v, ones, 0 * ones, chunk_size=5)
    torch.testing.assert_close(o[0, -1], v[0].sum(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_repeated_key_overwrites_its_value(chunk_size):
    k = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    o = gated_delta_rule(k, k, v, ones, 0 * ones, chunk_size=chunk_size)
    torch.testing.assert_close(o, v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_scalars_decay_before_they_are_corrected(chunk_size):
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v, half = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1), one[..., 0] / 2
    o = gated_delta_rule(one, one, v, half, half.log(), chunk_size=chunk_size)
    torch.testing.assert_close(o.flatten().tolist(), [0.5, 1.125], rtol=0, atol=1e-15)


def test_without_beta_nothing_is_written():
    q, k, v, beta, log_decay = arguments(77)
    assert (gated_delta_rule(q, k, v, 0 * beta, log_decay) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [2, 3, 63, 64, 65, 77, 197])
def test_a_token_changes_no_bit_of_earlier_outputs(num_tokens, dtype):
    inputs = [x.detach() for x in arguments(num_tokens, dtype=dtype)]
    before = gated_delta_rule(*inputs)
    for j in {1, num_tokens // 2, num_tokens - 1}:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, j] *= 0.5
        after = gated_delta_rule(*changed)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


def test_shapes_on_the_meta_device():
    inputs = [x.to("meta") for x in arguments(77, dtype=torch.bfloat16)]
    o = gated_delta_rule(*inputs)
    gradients = torch.autograd.grad(o.sum(), inputs)
    assert o.shape == (2, 77, 3, 24)
    assert o.dtype == torch.bfloat16
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_memory_grows_as_chunks_not_as_a_state_per_token():
    inputs = [x.to("meta") for x in arguments(1025, dims=(64, 64))]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        o = gated_delta_rule(*inputs)
    assert o.numel() < max(sizes) < 3 * o.numel()  # a state per token is 64 times as much


def test_it_compiles_to_one_graph():
    # Without code generation, which would take a minute; tracing is what can break.
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    inputs = arguments(77)
    found = output_and_gradients(compiled, inputs)
    for x, y in zip(found, output_and_gradients(gated_delta_rule, inputs), strict=True):
        assert relative_rms(x, y) <= 1e-12


def test_recomputation_changes_no_bit():
    inputs = arguments(77, dtype=torch.float32)

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(gated_delta_rule, *inputs, use_reentrant=False)

    found = output_and_gradients(recomputed, inputs)
    kept = output_and_gradients(gated_delta_rule, inputs)
    assert all(map(torch.equal, found, kept))


def test_autocast_changes_no_bit():
    inputs = arguments(77, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta_rule(*inputs)
    assert torch.equal(found, gated_delta_rule(*inputs))


def test_the_call_of_fla_means_the_same(monkeypatch):
    """The stand-in has the arguments of fla 0.5.2 and computes what its documentation says."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, *, use_qk_l2norm_in_kernel=False, chunk_size=64
    ):
        assert not use_qk_l2norm_in_kernel
        assert chunk_size == 32
        scale = k.shape[-1] ** -0.5 if scale is None else scale
        return definition(scale * q, k, v, beta, g), None

    kernels = SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", kernels)
    inputs = arguments(20)
    assert relative_rms(_fla(*inputs, 32), gated_delta_rule(*inputs)) <= 1e-12


def test_fla_is_refused_where_it_cannot_run(monkeypatch):
    inputs = arguments(20)
    with pytest.raises(ValueError, match=r"backend \('fla'\) must have CUDA tensors, not cpu"):
        gated_delta_rule(*inputs, backend="fla")
    with pytest.raises(ValueError, match=r"chunk_size \(20\) must be one of 16, 32, 64"):
        _fla(*inputs, 20)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(ValueError, match=r"backend \('fla'\) must be installed: pip install"):
        _fla(*inputs, 64)


def test_bad_arguments_are_refused():
    q, k, v, beta, log_decay = arguments(20)
    with pytest.raises(ValueError, match=r"q.shape \(2, 19, 3, 16\) must be \(2, 20, 3, 16\)"):
        gated_delta_rule(q[:, 1:], k, v, beta, log_decay)
    with pytest.raises(ValueError, match=r"v.shape \(2, 20, 2, 24\) must be \(2, 20, 3, 24\)"):
        gated_delta_rule(q, k, v[:, :, 1:], beta, log_decay)
    with pytest.raises(ValueError, match=r"beta.shape \(2, 20, 3, 1\) must be \(2, 20, 3\)"):
        gated_delta_rule(q, k, v, beta.unsqueeze(-1), log_decay)
    with pytest.raises(ValueError, match=r"k.shape \(2, 0, 3, 16\) must be \[B, N, H, D\]"):
        gated_delta_rule(*(x[:, :0] for x in (q, k, v, beta, log_decay)))
    with pytest.raises(ValueError, match=r"beta.dtype \(torch.int64\) must be a floating type"):
        gated_delta_rule(q, k, v, beta.long(), log_decay)
    with pytest.raises(ValueError, match=r"chunk_size \(0\) must be at least 1"):
        gated_delta_rule(q, k, v, beta, log_decay, chunk_size=0)
    with pytest.raises(ValueError, match=r"backend \('cuda'\) must be one of torch, fla"):
        gated_delta_rule(q, k, v, beta, log_decay, backend="cuda")

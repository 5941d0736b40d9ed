"""The recurrence of RWKV-7 against a loop over tokens in float64, and against known values."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_linclip.model.recurrences import dplr, gated_delta_rule
from linclip_kernels.linear_attention.reference import relative_rms

SIDES = ["right", "paper"]
#: Relative RMS of output and gradients, computed from inputs that the dtype represents.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2**-8}


def definition(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, a: Tensor, b: Tensor, *, side: str = "right"
) -> Tensor:
    state = r.new_zeros(r.shape[0], r.shape[2], v.shape[3], k.shape[3])  # [B, H, Dv, Dk]
    outputs = []
    for t in range(r.shape[1]):
        low_rank = torch.einsum("bhi,bhj->bhij", a[:, t], b[:, t])
        transition = torch.diag_embed(log_w[:, t].exp()) + low_rank
        state = state @ transition if side == "right" else transition @ state
        state = state + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return torch.stack(outputs, 1)


def arguments(
    num_tokens: int,
    side: str = "right",
    *,
    dtype: torch.dtype = torch.float64,
    dims: tuple[int, int] = (16, 24),
) -> list[Tensor]:
    """Return r, k, v, log_w, a, b with the decay and the rates of RWKV-7."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(size: int) -> Tensor:
        return torch.randn(2, num_tokens, 3, size, generator=generator, dtype=torch.float64)

    size = dims[0] if side == "right" else dims[1]
    kappa = F.normalize(normal(size), dim=-1)
    log_w = -(normal(size).sigmoid() * torch.tensor(-0.5).exp())
    tensors = [normal(dims[0]), normal(dims[0]), normal(dims[1])]
    tensors += [log_w, -kappa, normal(size).sigmoid() * kappa]
    return [x.to(dtype).requires_grad_() for x in tensors]


def output_and_gradients(function, inputs: list[Tensor], **options) -> list[Tensor]:
    o = function(*inputs, **options)
    # In bfloat16 first, so that every dtype has the same.
    weights = torch.linspace(-1, 1, o.numel()).view(o.shape).bfloat16()
    return [o, *torch.autograd.grad(o, inputs, weights.to(o.dtype))]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 31, 32, 33, 77, 197])
def test_output_and_gradients_are_those_of_the_definition(num_tokens, dtype, side):
    inputs = arguments(num_tokens, side, dtype=dtype)
    found = output_and_gradients(dplr, inputs, side=side)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = output_and_gradients(definition, exact, side=side)
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == dtype
        assert relative_rms(x, y) <= TOLERANCE[dtype]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 200])
def test_the_chunk_size_changes_rounding_only(chunk_size, side):
    inputs = arguments(77, side)
    found = dplr(*inputs, side=side, chunk_size=chunk_size)
    assert relative_rms(found, definition(*inputs, side=side)) <= 1e-12


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("log_w", [-0.6065, -2.5])
def test_the_strongest_decay_within_the_bound_loses_no_precision(log_w, side):
    inputs = arguments(64, side, dtype=torch.float32)
    with torch.no_grad():
        inputs[3].fill_(log_w)  # 32 tokens of -2.5 sum to the bound, -80
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = output_and_gradients(dplr, inputs, side=side)
    for x, y in zip(found, output_and_gradients(definition, exact, side=side), strict=True):
        assert relative_rms(x, y) <= 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_beyond_the_bound_the_result_is_no_number(side):
    inputs = [x.detach() for x in arguments(64, side, dtype=torch.float32)]
    inputs[3].fill_(-4)
    assert not dplr(*inputs, side=side).isfinite().all()
    truth = definition(*(x.double() for x in inputs), side=side)
    assert relative_rms(dplr(*inputs, side=side, chunk_size=16), truth) <= 1e-5


def test_one_token_returns_its_value():
    r, k, v, log_w, a, b = arguments(1)
    o = dplr(r, k, v, log_w, a, b)
    torch.testing.assert_close(o, (r * k).sum(-1, keepdim=True) * v, rtol=1e-13, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_only_the_right_side_overwrites_a_repeated_key(chunk_size):
    kappa = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    inputs = [kappa, kappa, v, torch.zeros_like(v), -kappa, kappa]
    o = dplr(*inputs, chunk_size=chunk_size)
    torch.testing.assert_close(o, v, rtol=0, atol=1e-14)
    o = dplr(*inputs, side="paper", chunk_size=chunk_size)
    # The old value stays, but for its part in the direction of the key.
    first, second = v[0, :, 0]
    left = first - (first @ kappa[0, 0, 0]) * kappa[0, 0, 0]
    torch.testing.assert_close(o[0, 1, 0], second + left, rtol=0, atol=1e-14)
    assert left.norm() > 0.1


def test_the_gated_delta_rule_is_a_special_case():
    q, k, v, log_w, _, _ = (x.detach() for x in arguments(77))
    k, log_w = F.normalize(k, dim=-1), log_w[..., :1]
    beta = torch.linspace(0, 1, 77, dtype=torch.float64).view(1, 77, 1, 1).expand(2, 77, 3, 1)
    # exp(g) (I - beta k k^T), with the gate in front of a alone.
    found = dplr(q, beta * k, v, log_w.expand_as(k), -beta * log_w.exp() * k, k)
    truth = gated_delta_rule(q, k, v, beta[..., 0], log_w[..., 0])
    assert relative_rms(found, truth) <= 1e-12


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [2, 3, 31, 32, 33, 77, 197])
def test_a_token_changes_no_bit_of_earlier_outputs(num_tokens, dtype, side):
    inputs = [x.detach() for x in arguments(num_tokens, side, dtype=dtype)]
    before = dplr(*inputs, side=side)
    for j in {1, num_tokens // 2, num_tokens - 1}:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, j] *= 0.5
        after = dplr(*changed, side=side)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


@pytest.mark.parametrize("side", SIDES)
def test_shapes_on_the_meta_device(side):
    inputs = [x.to("meta") for x in arguments(77, side, dtype=torch.bfloat16)]
    o = dplr(*inputs, side=side)
    gradients = torch.autograd.grad(o.sum(), inputs)
    assert o.shape == (2, 77, 3, 24)
    assert o.dtype == torch.bfloat16
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize("side", SIDES)
def test_memory_grows_as_chunks_not_as_a_state_per_token(side):
    inputs = [x.to("meta") for x in arguments(1025, side, dims=(64, 64))]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        o = dplr(*inputs, side=side)
    assert o.numel() < max(sizes) < 3 * o.numel()  # a state per token is 64 times as much


@pytest.mark.parametrize("side", SIDES)
def test_it_compiles_to_one_graph(side):
    # Without code generation, which would take a minute; tracing is what can break.
    compiled = torch.compile(dplr, fullgraph=True, backend="aot_eager")
    inputs = arguments(40, side)
    found = output_and_gradients(compiled, inputs, side=side)
    for x, y in zip(found, output_and_gradients(dplr, inputs, side=side), strict=True):
        assert relative_rms(x, y) <= 1e-12


def test_recomputation_changes_no_bit():
    inputs = arguments(77, dtype=torch.float32)

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(dplr, *inputs, use_reentrant=False)

    found, kept = output_and_gradients(recomputed, inputs), output_and_gradients(dplr, inputs)
    assert all(map(torch.equal, found, kept))


def test_autocast_changes_no_bit():
    inputs = arguments(77, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = dplr(*inputs)
    assert torch.equal(found, dplr(*inputs))


def test_bad_arguments_are_refused():
    r, k, v, log_w, a, b = arguments(20)
    with pytest.raises(ValueError, match=r"r.shape \(2, 19, 3, 16\) must be \(2, 20, 3, 16\)"):
        dplr(r[:, 1:], k, v, log_w, a, b)
    with pytest.raises(ValueError, match=r"a.shape \(2, 20, 3, 15\) must be \(2, 20, 3, 16\)"):
        dplr(r, k, v, log_w, a[..., 1:], b)
    with pytest.raises(ValueError, match=r"log_w.shape \(2, 20, 3, 16\) must be \(2, 20, 3, 24\)"):
        dplr(r, k, v, log_w, a, b, side="paper")
    with pytest.raises(ValueError, match=r"side \('left'\) must be one of right, paper"):
        dplr(r, k, v, log_w, a, b, side="left")
    with pytest.raises(ValueError, match=r"chunk_size \(0\) must be at least 1"):
        dplr(r, k, v, log_w, a, b, chunk_size=0)

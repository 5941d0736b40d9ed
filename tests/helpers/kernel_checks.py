"""Inputs, checks and the error rule that all tests of the operator share.

err(implementation) <= 2 * err(the definition in the same dtype) + ATOL[dtype]

where err is the relative RMS against the float64 definition, for the output and every gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad as gradient_of
from torch.func import jacfwd, jvp, vjp, vmap

from linclip_kernels import (
    linear_attention,
    linear_attention_from_state,
    linear_attention_packed,
    linear_attention_reference,
    linear_attention_state,
)
from linclip_kernels.linear_attention.reference import ATOL, attend, relative_rms
from linclip_kernels.linear_attention.validation import Backend
from linclip_kernels.linear_attention.variant import NORM_EPS, Variant

#: Attention of a model whose scores are scaled as those of softmax attention with heads of 32.
CENTERED = {"centered": True, "normalized": True, "qk_norm": False, "qk_scale": 32**-0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "eq7": {},
    "eq4": {"normalized": True},
    "causal-eq7": {"causal": True},
    "causal-eq4": {"causal": True, "normalized": True},
    "eq7-alpha": {"length_exponent": 0.5, "score_scale": 0.7},
    "causal-eq7-alpha": {"causal": True, "length_exponent": 1.0, "score_scale": 0.7},
    "eq4-raw": {"normalized": True, "qk_norm": False},
    "causal-eq4-raw": {"causal": True, "normalized": True, "qk_norm": False},
    "eq7-raw": {"qk_norm": False},
    "causal-eq7-raw": {"causal": True, "qk_norm": False},
    "centered": {**CENTERED},
    "causal-centered": {**CENTERED, "causal": True},
    "centered-norm": {"centered": True, "length_exponent": 0.5},
}
#: Every feature map but the default one, in variants that use it differently, and scaled products.
MAP_VARIANTS: dict[str, dict[str, Any]] = {
    "eq4-relu": {"feature_map": "relu", "normalized": True},
    "causal-eq7-relu": {"feature_map": "relu", "causal": True},
    "eq7-softplus": {"feature_map": "softplus"},
    "causal-eq4-softplus": {"feature_map": "softplus", "causal": True, "normalized": True},
    "eq7-identity": {"feature_map": "identity", "qk_norm": False},
    "causal-eq7-identity": {"feature_map": "identity", "causal": True, "length_exponent": 0.5},
    "eq4-quadratic": {"feature_map": "quadratic", "normalized": True},
    "eq7-quadratic": {"feature_map": "quadratic", "qk_norm": False, "length_exponent": 0.5},
    "causal-eq4-quadratic": {"feature_map": "quadratic", "causal": True, "normalized": True},
    "causal-eq4-scaled": {"qk_scale": 0.3, "causal": True, "normalized": True},
    "eq4-relu-scaled": {"feature_map": "relu", "qk_scale": 0.3, "length_exponent": 0.5},
    "causal-eq7-softplus-scaled": {"feature_map": "softplus", "qk_scale": 3.0, "causal": True},
    "eq4-quadratic-scaled": {"feature_map": "quadratic", "qk_scale": 2.0, "normalized": True},
}


def bounds_scores(variant: dict[str, Any]) -> bool:
    """Return whether rows of q and k may be of any length."""
    return variant.get("qk_norm", True) or variant.get("centered", False)


def make_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    packed: bool = False,
    qk_norm: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v that require gradients, and an output gradient, for shape (B, N, H, D, Dv).

    With packed, q, k, v are views of one [B, N, H, 3, D]. Without qk_norm the rows of q and k are
    short, as the operator requires.
    """
    batch, num_tokens, heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if qk_norm else 0.7 * key_dim**-0.5

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = batch, num_tokens, heads
    if packed:
        assert key_dim == value_dim
        qkv = draw(*rows, 3, key_dim)
        qkv[..., :2, :] *= scale
        inputs = list(qkv.to(device, dtype).unbind(3))
    else:
        inputs = [
            draw(*rows, key_dim) * scale,
            draw(*rows, key_dim) * scale,
            draw(*rows, value_dim),
        ]
        inputs = [x.to(device, dtype) for x in inputs]
    # The gradient is a permuted tensor, as it may be in a model.
    grad = draw(batch, heads, num_tokens, value_dim).transpose(1, 2).to(device, dtype)
    return [x.detach().requires_grad_() for x in inputs], grad


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, **options: Any
) -> list[Tensor]:
    """Return the output, dq, dk, dv."""
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check_against_definition(
    inputs: list[Tensor],
    grad: Tensor,
    backend: str,
    *,
    function: Callable[..., Tensor] = linear_attention,
    **options: Any,
) -> None:
    """Check output and gradients of the operator, or its halves, by the rule of this module."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(linear_attention_reference, exact, grad.double(), **options)
    rough = with_gradients(lambda q, k, v: attend(q, k, v, Variant(**options)), inputs, grad)
    found = with_gradients(function, inputs, grad, backend=backend, **options)
    for name, value, by_plain, true in zip(
        ("o", "dq", "dk", "dv"), found, rough, truth, strict=True
    ):
        assert value.dtype == dtype
        assert value.shape == true.shape
        error, allowed = relative_rms(value, true), 2 * relative_rms(by_plain, true) + ATOL[dtype]
        assert error <= allowed, f"{name}: relative RMS {error:.2e} > {allowed:.2e}"


def from_state(q: Tensor, k: Tensor, v: Tensor, *, parts: int = 1, **options: Any) -> Tensor:
    """Call the two halves of the operator; the states of the parts of the keys are added."""
    names = ("qk_norm", "feature_map", "backend")
    shared: dict[str, Any] = {name: options[name] for name in names if name in options}
    cut = [x.tensor_split(parts, dim=1) for x in (k, v)]
    states = [linear_attention_state(*part, **shared) for part in zip(*cut, strict=True)]
    state = states[0] if parts == 1 else torch.stack(states).sum(0)
    return linear_attention_from_state(q, state, **options)


def check_halves_against_definition(
    shape: tuple[int, int, int, int, int],
    num_queries: int,
    dtype: torch.dtype,
    backend: str,
    device: str,
    *,
    parts: int = 1,
    **options: Any,
) -> None:
    """Check the state, and queries that see it, by the rule; shape is (B, keys, H, D, Dv)."""
    batch, _, heads, key_dim, value_dim = shape
    scale = bounds_scores(options)
    (_, k, v), _ = make_inputs(shape, dtype, device=device, qk_norm=scale)
    queries = batch, num_queries, heads, key_dim, value_dim
    (q, _, _), grad = make_inputs(queries, dtype, device=device, qk_norm=scale, seed=1)
    halves = partial(from_state, parts=parts)
    check_against_definition([q, k, v], grad, backend, function=halves, **options)


def check_single_key_state(variant: dict[str, Any], backend: str, device: str) -> None:
    """One key, Eq. 4 or centred: exactly its value, for any query, and no gradient to q and k."""
    (q, _, _), grad = make_inputs((2, 3, 2, 16, 16), torch.float32, device=device)
    (_, _, v), _ = make_inputs((2, 1, 2, 16, 16), torch.float32, device=device)
    k = (-q[:, :1].detach()).requires_grad_()
    options = {**variant, "backend": backend, "parts": 2}  # the second part is empty
    out, d_q, d_k, d_v = with_gradients(from_state, [q, k, v], grad, **options)
    assert torch.equal(out, v.expand_as(out))
    assert not d_q.any()
    assert not d_k.any()
    torch.testing.assert_close(d_v, grad.sum(1, keepdim=True))


def check_empty_halves(variant: dict[str, Any], backend: Backend, device: str) -> None:
    """No keys give a state of zeros, no queries an empty output; gradients are zero or empty."""
    inputs, grad = make_inputs((2, 0, 2, 16, 24), torch.float32, device=device)
    shared = {name: variant[name] for name in ("qk_norm", "feature_map") if name in variant}
    state = linear_attention_state(*inputs[1:], backend=backend, **shared)
    assert state.dtype == torch.float32
    assert not state.any()
    d_k, d_v = torch.autograd.grad(state, inputs[1:], torch.ones_like(state))
    assert (d_k.shape, d_v.shape) == (inputs[1].shape, inputs[2].shape)
    seen = torch.ones_like(state).requires_grad_()
    out = linear_attention_from_state(inputs[0], seen, backend=backend, **variant)
    assert out.shape == inputs[2].shape
    d_q, d_state = torch.autograd.grad(out, [inputs[0], seen], grad)
    assert d_q.shape == inputs[0].shape
    assert not d_state.any()


def check_collapsed_keys(
    variant: dict[str, Any], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Keys collapsed to minus the query's direction: the denominator of Eq. 4 reaches zero."""
    inputs, grad = make_inputs((1, 70, 1, 32, 32), dtype, device=device)
    direction = 10 * inputs[0][:, :1].detach()
    q = direction.expand_as(inputs[0]).clone().requires_grad_()
    k = (-direction).expand_as(inputs[1]).clone().requires_grad_()
    found = with_gradients(linear_attention, [q, k, inputs[2]], grad, backend=backend, **variant)
    for value in found:
        assert value.isfinite().all()
    if variant.get("causal"):
        assert torch.equal(found[0][:, 0], inputs[2][:, 0])  # one key: its value, exactly
        assert not found[1][:, 0].any()  # and no gradient to q


def check_single_key(variant: dict[str, Any], backend: str, device: str) -> None:
    """Eq. 4 with one key of score zero, or centred, gives its value, and no gradient to q and k."""
    (q, _, v), grad = make_inputs((2, 1, 2, 16, 16), torch.float32, device=device)
    k = (-q.detach()).requires_grad_()
    out, d_q, d_k, d_v = with_gradients(
        linear_attention, [q, k, v], grad, backend=backend, **variant
    )
    assert torch.equal(out, v)
    assert not d_q.any()
    assert not d_k.any()
    assert torch.equal(d_v, grad)


def check_nan_stays_where_the_formula_puts_it(
    variant: dict[str, Any], backend: str, device: str
) -> None:
    """A NaN in one entry of q, k or v reaches what depends on it, and nothing else."""
    row, head, column = 5, 1, 3
    earlier, this, later = slice(0, row), slice(row, row + 1), slice(row + 1, None)
    causal, normalized = variant.get("causal", False), variant.get("normalized", False)
    normalized = normalized or variant.get("centered", False)  # sums of scores also see all keys
    # Rows of o, dq, dk, dv that must stay clean.
    others = [earlier, later]
    before = [earlier] if causal else []
    after = [later] if causal else []
    clean_rows = {
        "q": (others, others, after, after),
        "k": (before, before, [] if normalized else others, [] if normalized else others),
        "v": (before, before, [] if normalized else others, [earlier, this, later]),
    }
    inputs, grad = make_inputs((2, 40, 2, 32, 32), torch.float32, device=device)
    clean = with_gradients(linear_attention, inputs, grad, backend=backend, **variant)
    for name, x, rows in zip("qkv", inputs, clean_rows.values(), strict=True):
        poisoned = [y.detach().clone().requires_grad_() for y in inputs]
        with torch.no_grad():
            poisoned["qkv".index(name)][0, row, head, column] = float("nan")
        dirty = with_gradients(linear_attention, poisoned, grad, backend=backend, **variant)
        assert dirty[0][0, row, head, column].isnan(), name
        for expected, found, row_sets in zip(clean, dirty, rows, strict=True):
            assert torch.equal(expected[1], found[1])
            assert torch.equal(expected[0, :, 0], found[0, :, 0])
            for place in row_sets:
                assert_close(found[0, place, head], expected[0, place, head])
        if name == "v":  # a column of o sees one column of v
            free = [i for i in range(32) if i != column]
            assert_close(dirty[0][..., free], clean[0][..., free])
        assert x.isfinite().all()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_pieces_match_whole(
    variant: dict[str, Any],
    backend: str,
    device: str,
    cut: int,
    num_tokens: int,
    dims: tuple[int, int] = (16, 24),
    heads: int = 2,
) -> None:
    """A sequence computed in two pieces, with their states, matches the sequence in one piece.

    Causal: the second piece continues the first. Bidirectional: each piece gets the other's state,
    as ranks do that hold parts of one sequence.
    """
    inputs, grad = make_inputs((2, num_tokens, heads, *dims), torch.float32, device=device)

    def in_two_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [[x[:, :cut] for x in (q, k, v)], [x[:, cut:] for x in (q, k, v)]]
        options = {**variant, "backend": backend}
        states = [linear_attention(*x, return_state=True, **options)[1] for x in pieces]
        others: list[Tensor | None] = [None if variant.get("causal") else states[1], states[0]]
        rows = [
            linear_attention(*x, initial_state=state, **options)
            for x, state in zip(pieces, others, strict=True)
        ]
        return torch.cat(rows, 1)

    whole = with_gradients(linear_attention, inputs, grad, backend=backend, **variant)
    found = with_gradients(in_two_pieces, inputs, grad)
    for value, expected in zip(found, whole, strict=True):
        error = relative_rms(value, expected.double())
        assert error <= 20 * ATOL[torch.float32], f"relative RMS {error:.2e}"


def check_sequences_are_independent(
    variant: dict[str, Any], backend: str, device: str, lengths: list[int]
) -> None:
    """Sequences concatenated in one batch entry are computed as if each were alone."""
    options = {**variant, "backend": backend, "return_state": True}
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    inputs, grad = make_inputs((1, sum(lengths), 2, 16, 24), torch.float32, device=device)
    together, states = linear_attention(*inputs, cu_seqlens=boundaries, **options)
    pieces = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    alone = [linear_attention(*piece, **options) for piece in pieces if piece[0].numel()]
    expected = torch.cat([out for out, _ in alone], dim=1)
    kept = [i for i, length in enumerate(lengths) if length]
    expected_states = torch.cat([state for _, state in alone])
    grad_states = torch.randn_like(states)
    found = torch.autograd.grad([together, states], inputs, [grad, grad_states])
    truth = torch.autograd.grad([expected, expected_states], inputs, [grad, grad_states[kept]])
    pairs = zip((together, states[kept], *found), (expected, expected_states, *truth), strict=True)
    for value, true in pairs:
        error = relative_rms(value.detach(), true.detach().double())
        assert error <= 20 * ATOL[torch.float32], f"relative RMS {error:.2e}"
    empty = [i for i, length in enumerate(lengths) if not length]
    assert not states[empty].any()


def check_small_features(variant: dict[str, Any], backend: str, device: str) -> None:
    """softplus of rows far below zero, not normalised, is e^x, and must keep all its digits."""
    (q, k, v), grad = make_inputs((1, 50, 1, 32, 32), torch.float32, device=device)
    inputs = [(q.detach() + 5).requires_grad_(), (k.detach() - 16).requires_grad_(), v]
    options = {"feature_map": "softplus", "qk_norm": False, **variant}
    check_against_definition(inputs, grad, backend, **options)


def check_cancelling_sums(
    variant: dict[str, Any], backend: str, device: str, num_tokens: int
) -> None:
    """bfloat16 where the state's leading digits cancel, so that its low half matters.

    The keys lie near minus the queries, scores near 0, and the values have a large common mean.
    """
    (q, k, v), grad = make_inputs((1, num_tokens, 1, 64, 64), torch.float32, device=device)
    direction = F.normalize(q[:, :1].detach(), dim=-1) * 8
    q = direction + 0.1 * q.detach()
    k = -direction + k.detach() * 0.3
    v = 4 + v.detach()
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    check_against_definition(inputs, grad.bfloat16(), backend, **variant)


def check_packed_matches_plain(
    variant: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    device: str,
    *,
    num_tokens: int = 150,
    dim: int = 16,
    cu_seqlens: list[int] | None = None,
) -> None:
    """A packed qkv gives the bits of q, k, v: output, state and gradients, after a state or not."""
    batch = 2 if cu_seqlens is None else 1
    options: dict[str, Any] = {**variant, "backend": backend, "cu_seqlens": cu_seqlens}
    inputs, grad = make_inputs((batch, num_tokens, 2, dim, dim), dtype, device=device, packed=True)
    qkv = torch.stack([x.detach() for x in inputs], 3).requires_grad_()
    _, state = linear_attention(*inputs, return_state=True, **options)
    initial = (1 + state.detach().abs()).requires_grad_()
    grad_state = torch.randn_like(state)
    for start, leaves in ((None, [qkv]), (initial, [qkv, initial])):
        results = []
        for out, end in (
            linear_attention(*qkv.unbind(3), initial_state=start, return_state=True, **options),
            linear_attention_packed(qkv, initial_state=start, return_state=True, **options),
        ):
            found = torch.autograd.grad([out, end], leaves, [grad, grad_state])
            results.append([out, end, *found])
        assert results[1][2].is_contiguous()
        assert all(map(torch.equal, *results))


def check_keys_with_a_mean(
    variant: dict[str, Any], dtype: torch.dtype, backend: str, device: str, num_tokens: int
) -> None:
    """Keys whose mean is several times their spread: centred scores lose no digits by it."""
    (q, k, v), grad = make_inputs((1, num_tokens, 2, 32, 40), dtype, device=device)
    mean = torch.tensor([5.0, -4.0, 6.0, 3.0] * 8, device=device)
    inputs = [x.detach().requires_grad_() for x in (q, (k + mean).to(dtype), v)]
    check_against_definition(inputs, grad, backend, **variant)


def check_later_tokens_do_not_matter(
    variant: dict[str, Any], backend: Backend, device: str, num_tokens: int
) -> None:
    """Causal: changing q, k, v from some token on leaves all earlier outputs bitwise the same."""
    inputs, _ = make_inputs((1, num_tokens, 2, 32, 32), torch.float32, device=device)
    others, _ = make_inputs((1, num_tokens, 2, 32, 32), torch.float32, device=device, seed=1)
    cut = num_tokens // 2 + 3
    with torch.no_grad():
        mixed = [
            torch.cat([x[:, :cut], y[:, cut:]], 1) for x, y in zip(inputs, others, strict=True)
        ]
        call = partial(linear_attention, backend=backend, return_state=False, **variant)
        out, changed = call(*inputs), call(*mixed)
    assert torch.equal(out[:, :cut], changed[:, :cut])
    assert not torch.equal(out[:, cut:], changed[:, cut:])


def check_transforms(function: Callable[..., Tensor], device: str) -> None:
    """torch.func's reverse mode and vmap agree with autograd; forward mode is refused.

    Args:
        function: (q, k, v) -> [B, N, H, Dv].
        device: Where to run.
    """
    inputs, out_grad = make_inputs((3, 20, 2, 16, 16), torch.float32, device=device)
    q, k, v = plain = tuple(x.detach() for x in inputs)
    expected = with_gradients(function, inputs, out_grad)

    def loss(q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor) -> Tensor:
        return (function(q, k, v) * out_grad).sum()

    def one_sample(q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor) -> Tensor:
        return loss(q[None], k[None], v[None], out_grad[None])

    everything = 0, 1, 2
    of_batch: Any = gradient_of(loss, everything)
    of_samples: Any = vmap(gradient_of(one_sample, everything))
    out, backward, *_ = vjp(function, *plain)
    for found in (
        [out, *backward(out_grad)],
        [out, *of_batch(*plain, out_grad)],
        [out, *of_samples(*plain, out_grad)],
    ):
        for value, true in zip(found, expected, strict=True):
            torch.testing.assert_close(value, true)
    mapped = vmap(function, in_dims=(2, None, None), out_dims=1)(torch.stack([q, k], 2), k, v)
    torch.testing.assert_close(mapped, torch.stack([function(q, k, v), function(k, k, v)], 1))

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(function, plain, plain)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jacfwd(lambda v: function(q, k, v))(v)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        function(q, forward_ad.make_dual(k, k), v)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient_of(lambda q: gradient_of(loss)(q, k, v, out_grad).sum())(q)


def check_changed_state(variant: dict[str, Any], backend: Backend, device: str) -> None:
    """The returned state may be changed in place before the backward, as an all-reduce would."""
    inputs, grad = make_inputs((1, 140, 2, 16, 24), torch.float32, device=device)
    options = {**variant, "backend": backend}
    expected = with_gradients(linear_attention, inputs, grad, **options)
    out, state = linear_attention(*inputs, return_state=True, **options)
    with torch.no_grad():
        state += 1
    for value, true in zip([out, *torch.autograd.grad(out, inputs, grad)], expected, strict=True):
        assert_close(value, true)


def check_gradients_of_state(variant: dict[str, Any], backend: Backend, device: str) -> None:
    """A gradient of the returned state reaches k, v and the initial state, in all of its entries.

    Also in entries that the output does not need: the definition of the state tells them.
    """
    inputs, _ = make_inputs((2, 70, 2, 16, 24), torch.float32, device=device)
    initial = torch.ones(2, 2, 17, 25, device=device, requires_grad=True)
    options = {**variant, "backend": backend, "return_state": True}
    _, found = linear_attention(*inputs, initial_state=initial, **options)
    exact = [x.detach().double().requires_grad_() for x in (*inputs[1:], initial)]
    phi, values = _features(exact[0], Variant(**variant)), exact[1]
    rows, columns = (F.pad(phi, (1, 0), value=1.0), F.pad(values, (0, 1), value=1.0))
    true = exact[2] + torch.einsum("bnhd,bnhe->bhde", rows, columns)
    grad = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, [*inputs[1:], initial], grad),
        torch.autograd.grad(true, exact, grad.double()),
        strict=True,
    )
    for value, expected in pairs:
        if value.shape == initial.shape:
            expected[..., 0, -1] = 0  # the number of keys is not differentiated
        error = relative_rms(value, expected)
        assert error <= 2 * ATOL[torch.float32], f"relative RMS {error:.2e}"


def _features(x: Tensor, variant: Variant) -> Tensor:
    """Return phi of rows of keys."""
    if variant.qk_norm:
        x = x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
    if variant.feature_map == "relu":
        return F.relu(x)
    return F.softplus(x) if variant.feature_map == "softplus" else x


def check_extreme_rows(
    variant: dict[str, Any], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Rows from 1e-25 to 1e18 are right; those whose |x|^2 overflows float32 count as NaN."""
    inputs, grad = make_inputs((1, 70, 1, 32, 32), dtype, device=device)
    with torch.no_grad():
        for x in inputs[:2]:
            x[:, 3::7] *= 1e18
            x[:, 4::7] *= 1e-25
    check_against_definition(inputs, grad, backend, **variant)
    row = 40
    for i in range(2):
        overflowing = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.no_grad():
            overflowing[i][:, row] = 2e19
        out, *gradients = with_gradients(
            linear_attention, overflowing, grad, backend=backend, **variant
        )
        assert out[:, row].isnan().all()
        assert gradients[i][:, row].isnan().all()
        if variant.get("causal"):
            assert out[:, :row].isfinite().all()
        if i == 0:
            assert out[:, row + 1 :].isfinite().all()


def check_strides(variant: dict[str, Any], backend: str, device: str) -> None:
    """A stride in the last axis, and keys and values that all heads share, give the same bits."""
    (q, k, v), grad = make_inputs((2, 40, 2, 32, 48), torch.float32, device=device)
    shared = [x.detach()[:, :, :1].expand_as(x) for x in (k, v)]
    for tensors in (
        [torch.stack([x, x.neg()], -1).detach()[..., 0] for x in (q, k, v)],
        [x.detach().mT.contiguous().mT for x in (q, k, v)],
        [q.detach(), *shared],
    ):
        strided = [x.requires_grad_() for x in tensors]
        plain = [x.detach().clone(memory_format=torch.contiguous_format) for x in strided]
        assert any(x.stride() != y.stride() for x, y in zip(strided, plain, strict=True))
        found = with_gradients(linear_attention, strided, grad, backend=backend, **variant)
        plain = [x.requires_grad_() for x in plain]
        expected = with_gradients(linear_attention, plain, grad, backend=backend, **variant)
        assert all(map(torch.equal, found, expected))

"""The two halves of the bidirectional operator: the state of keys, and queries that see it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from helpers.kernel_checks import (
    MAP_VARIANTS,
    VARIANTS,
    bounds_scores,
    check_empty_halves,
    check_halves_against_definition,
    check_single_key_state,
    check_transforms,
    from_state,
    make_inputs,
    with_gradients,
)
from linclip_kernels import linear_attention, linear_attention_from_state, linear_attention_state
from linclip_kernels.linear_attention import torch_backend
from linclip_kernels.linear_attention.variant import Variant

BIDIRECTIONAL = {
    name: variant
    for name, variant in {**VARIANTS, **MAP_VARIANTS}.items()
    if not variant.get("causal")
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The halves one after the other, computed by the torch backend.
halves = partial(from_state, backend="torch")


@pytest.mark.long
@pytest.mark.parametrize("variant", BIDIRECTIONAL)
@pytest.mark.parametrize(
    ("num_keys", "num_queries", "dtype"),
    [(77, 300, DTYPES[0]), (197, 5, DTYPES[1]), (2, 1, DTYPES[2])],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_halves_match_definition(
    variant: str, num_keys: int, num_queries: int, dtype: torch.dtype, parts: int
) -> None:
    """Parts of the keys as ranks hold them: of 3 ranks with 2 keys, one has none."""
    shape, options = (2, num_keys, 2, 20, 40), BIDIRECTIONAL[variant]
    check_halves_against_definition(
        shape, num_queries, dtype, "torch", "cpu", parts=parts, **options
    )


@pytest.mark.parametrize("variant", BIDIRECTIONAL)
@pytest.mark.parametrize("num_tokens", [1, 2, 150])
def test_halves_match_whole_operator(variant: str, num_tokens: int) -> None:
    options = BIDIRECTIONAL[variant]
    qk_norm = bounds_scores(options)
    inputs, grad = make_inputs((2, num_tokens, 2, 16, 24), torch.float64, qk_norm=qk_norm)
    whole = with_gradients(linear_attention, inputs, grad, **options)
    for parts in (1, 4):
        found = with_gradients(halves, inputs, grad, parts=parts, **options)
        for value, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    shared = {name: options[name] for name in ("qk_norm", "feature_map") if name in options}
    state = linear_attention_state(*inputs[1:], **shared)
    torch.testing.assert_close(
        state, linear_attention(*inputs, return_state=True, **options)[1], rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("variant", BIDIRECTIONAL)
def test_long_sequences_are_cut_into_pieces(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "MIN_PIECE", 40)
    monkeypatch.setattr(torch_backend, "PIECE_ROWS", 1)
    shape = 1, 150, 2, 20, 24
    check_halves_against_definition(
        shape, 90, torch.float32, "torch", "cpu", **BIDIRECTIONAL[variant]
    )


@pytest.mark.parametrize("variant", ["eq7", "eq4", "centered", "eq4-relu", "eq4-quadratic"])
def test_gradcheck(variant: str) -> None:
    options = BIDIRECTIONAL[variant]
    (_, k, v), _ = make_inputs((2, 6, 1, 3, 2), torch.float64)
    (q, _, _), _ = make_inputs((2, 4, 1, 3, 2), torch.float64, seed=1)
    shared = {name: options[name] for name in ("qk_norm", "feature_map") if name in options}
    state = linear_attention_state(k, v, **shared).detach()
    number = state[..., :1, -1:].clone()

    def attend(q: Tensor, sums: Tensor) -> Tensor:
        # The number of keys is not differentiated.
        first = torch.cat([sums[..., :1, :-1], number], dim=-1)
        return linear_attention_from_state(q, torch.cat([first, sums[..., 1:, :]], -2), **options)

    torch.autograd.gradcheck(partial(linear_attention_state, **shared), [k, v])
    torch.autograd.gradcheck(attend, [q, state.requires_grad_()])


@pytest.mark.parametrize("variant", BIDIRECTIONAL)
def test_empty_halves(variant: str) -> None:
    check_empty_halves(BIDIRECTIONAL[variant], "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq4", "centered"])
def test_state_of_a_single_key(variant: str) -> None:
    check_single_key_state(BIDIRECTIONAL[variant], "torch", "cpu")


def test_the_number_of_keys_has_no_gradient() -> None:
    (q, k, v), grad = make_inputs((2, 9, 2, 16, 16), torch.float32)
    state = linear_attention_state(k, v)
    assert (state[:, :, 0, -1] == 9).all()
    out = linear_attention_from_state(q, state, length_exponent=0.5)
    (d_state,) = torch.autograd.grad(out, state, grad)
    assert not d_state[:, :, 0, -1].any()


def test_state_may_be_changed_in_place() -> None:
    inputs, _ = make_inputs((1, 30, 2, 16, 16), torch.float32)
    state = linear_attention_state(*inputs[1:])
    grad = torch.randn_like(state)
    expected = torch.autograd.grad(state, inputs[1:], grad, retain_graph=True)
    with torch.no_grad():
        state += 1
    assert all(map(torch.equal, torch.autograd.grad(state, inputs[1:], grad), expected))


@pytest.mark.parametrize("variant", ["eq7", "eq4-quadratic"])
def test_transforms_of_torch_func(variant: str) -> None:
    check_transforms(partial(halves, **BIDIRECTIONAL[variant]), "cpu")


@pytest.mark.long
@pytest.mark.parametrize("variant", ["eq4", "eq7-quadratic"])
def test_compiles_to_one_graph_for_all_lengths(variant: str) -> None:
    options = BIDIRECTIONAL[variant]
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return halves(q, k, v, **options) * 2

    compiled = torch.compile(
        attend, backend=aot_autograd(fw_compiler=count), fullgraph=True, dynamic=True
    )
    for num_tokens in (77, 150, 1030):
        inputs, grad = make_inputs((1, num_tokens, 2, 32, 32), torch.float32)
        plain = with_gradients(attend, inputs, grad)
        again = with_gradients(compiled, inputs, grad)
        assert all(map(torch.equal, plain, again))
    assert graphs == 2  # the forward and the backward


def test_operators_are_registered_as_torch_wants_them() -> None:
    (q, k, v), _ = make_inputs((1, 20, 2, 16, 24), torch.float32)
    q, k, v = (x.detach() for x in (q, k, v))  # autograd differentiates the functions around them
    torch.library.opcheck(torch.ops.linclip.linear_attention_state, (k, v, True, "relu", False))
    state = linear_attention_state(k, v)
    arguments = q, state, *Variant(normalized=True), False
    torch.library.opcheck(torch.ops.linclip.linear_attention_from_state, arguments)


def test_second_derivative_is_refused() -> None:
    (q, k, v), grad = make_inputs((1, 9, 1, 16, 16), torch.float32)
    out = halves(q, k, v)
    for x in (q, v):
        (d_x,) = torch.autograd.grad(out, x, grad.requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            d_x.sum().backward(retain_graph=True)


@pytest.mark.parametrize("variant", ["eq7", "eq4-quadratic"])
def test_autocast_casts_as_torch_attention_does(variant: str) -> None:
    options = BIDIRECTIONAL[variant]
    (q, k, v), grad = make_inputs((1, 150, 2, 32, 32), torch.float32)
    low = [x.bfloat16().detach().requires_grad_() for x in (q, k, v)]
    expected = with_gradients(halves, low, grad.bfloat16(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(halves, [q, k, low[2]], grad.bfloat16(), **options)
        shared = {name: options[name] for name in ("feature_map",) if name in options}
        assert linear_attention_state(k, v, **shared).dtype == torch.float32
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert all(map(torch.equal, (x.float() for x in found), (x.float() for x in expected)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(0, 5, 2, 16)}, "k.shape (0, 5, 2, 16) must be [B, N, H, D] with no"),
        ({"v": torch.zeros(2, 6, 2, 16)}, "v.shape (2, 6, 2, 16) must start with k's [B, N, H]"),
        ({"v": torch.zeros(2, 5, 2, 16).half()}, "v.dtype (torch.float16) must equal k.dtype"),
        ({"feature_map": "elu"}, "feature_map ('elu') must be one of affine, quadratic"),
        ({"backend": "triton", "v": torch.zeros(2, 5, 2, 8)}, "v.shape[-1] (8) must be in 16..256"),
    ],
)
def test_bad_keys_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {name: torch.zeros(2, 5, 2, 16) for name in "kv"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention_state(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(2, 17, 17)}, "state.shape (2, 17, 17) must be (2, 2, 17, Dv + 1)"),
        ({"state": torch.zeros(2, 2, 17, 1)}, "must be (2, 2, 17, Dv + 1)"),
        (
            {"feature_map": "identity", "centered": True},
            "feature_map ('identity') must be 'affine' when centered",
        ),
        ({"feature_map": "quadratic"}, "state.shape (2, 2, 17, 25) must be (2, 2, 161, Dv + 1)"),
        ({"state": torch.zeros(2, 2, 17, 25).double()}, "state.dtype (torch.float64) must be"),
        (
            {"backend": "triton", "state": torch.zeros(2, 2, 17, 9)},
            "state.shape[-1] - 1 (8) must be in 16..256",
        ),
        ({"backend": "triton"}, "backend ('triton') must have CUDA tensors, not cpu"),
    ],
)
def test_bad_queries_and_states_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": torch.zeros(2, 5, 2, 16), "state": torch.zeros(2, 2, 17, 25)}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention_from_state(**arguments | change)

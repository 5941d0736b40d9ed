"""The torch backend and the public function against the definition."""

import gc
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from helpers.kernel_checks import (
    CENTERED,
    MAP_VARIANTS,
    VARIANTS,
    bounds_scores,
    check_against_definition,
    check_cancelling_sums,
    check_changed_state,
    check_collapsed_keys,
    check_extreme_rows,
    check_gradients_of_state,
    check_keys_with_a_mean,
    check_later_tokens_do_not_matter,
    check_nan_stays_where_the_formula_puts_it,
    check_pieces_match_whole,
    check_sequences_are_independent,
    check_single_key,
    check_small_features,
    check_strides,
    check_transforms,
    make_inputs,
    relative_rms,
    with_gradients,
)
from linclip_kernels import linear_attention, linear_attention_reference
from linclip_kernels.linear_attention import torch_backend
from linclip_kernels.linear_attention.variant import Variant

CAUSAL = {name: variant for name, variant in VARIANTS.items() if variant.get("causal")}
MAIN_VARIANTS = ["eq7", "eq4", "causal-eq7", "causal-eq4", "centered", "causal-centered"]
LENGTHS = (1, 2, 15, 63, 77, 197, 500, 577, 1025)
DIMS = (32, 60, 64, 80, 96, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Every length with every dtype, the widths in turn.
SHAPES = [
    (length, dtype, DIMS[i % len(DIMS)])
    for i, (length, dtype) in enumerate(itertools.product(LENGTHS, DTYPES))
]


@pytest.mark.long
@pytest.mark.parametrize("variant", MAIN_VARIANTS)
@pytest.mark.parametrize(("num_tokens", "dtype", "dim"), SHAPES)
def test_torch_backend_matches_definition(
    num_tokens: int, dtype: torch.dtype, dim: int, variant: str
) -> None:
    inputs, grad = make_inputs((1, num_tokens, 2, dim, dim), dtype)
    check_against_definition(inputs, grad, "torch", **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value_dim", [24, 96])
def test_torch_backend_with_other_value_width(variant: str, value_dim: int) -> None:
    qk_norm = bounds_scores(VARIANTS[variant])
    inputs, grad = make_inputs((2, 150, 2, 48, value_dim), torch.float32, qk_norm=qk_norm)
    check_against_definition(inputs, grad, "torch", **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_backend_reads_packed_views(variant: str) -> None:
    qk_norm = bounds_scores(VARIANTS[variant])
    inputs, grad = make_inputs((2, 65, 3, 32, 32), torch.float32, packed=True, qk_norm=qk_norm)
    assert not inputs[0].is_contiguous()
    check_against_definition(inputs, grad, "torch", **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 5, 130])  # 130: several causal tiles, the last one short
def test_gradcheck(variant: str, num_tokens: int) -> None:
    qk_norm = bounds_scores(VARIANTS[variant])
    inputs, _ = make_inputs((1, num_tokens, 1, 2, 1), torch.float64, qk_norm=qk_norm)
    torch.autograd.gradcheck(
        lambda q, k, v: linear_attention(q, k, v, **VARIANTS[variant]),
        inputs,
        fast_mode=num_tokens > 5,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_computed_in_float64(variant: str) -> None:
    qk_norm = bounds_scores(VARIANTS[variant])
    inputs, grad = make_inputs((2, 150, 2, 16, 24), torch.float64, qk_norm=qk_norm)
    found = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    truth = with_gradients(linear_attention_reference, inputs, grad, **VARIANTS[variant])
    assert max(map(relative_rms, found, truth)) < 1e-13


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
def test_clamped_denominator_passes_no_gradient(variant: str) -> None:
    inputs, grad = make_inputs((1, 20, 1, 8, 8), torch.float64)
    direction = 10 * inputs[0][:, :1].detach()
    q = direction.expand_as(inputs[0]).clone().requires_grad_()
    k = (-direction).expand_as(inputs[1]).clone().requires_grad_()
    inputs = [q, k, inputs[2]]
    found = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    truth = with_gradients(linear_attention_reference, inputs, grad, **VARIANTS[variant])
    assert max(map(relative_rms, found, truth)) < 1e-6  # 1 - |q|^2 keeps few of its digits


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivative_is_refused(variant: str) -> None:
    (q, k, v), grad = make_inputs((1, 9, 1, 16, 16), torch.float32)
    out = linear_attention(q, k, v, **VARIANTS[variant])
    (d_q,) = torch.autograd.grad(out, q, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        d_q.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [77, 300])
def test_same_bits_twice(variant: str, num_tokens: int) -> None:
    inputs, grad = make_inputs((2, num_tokens, 2, 32, 32), torch.float32)
    first = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    second = with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_stays_where_the_formula_puts_it(variant: str) -> None:
    check_nan_stays_where_the_formula_puts_it(VARIANTS[variant], "torch", "cpu")


@pytest.mark.long
@pytest.mark.parametrize("variant", MAIN_VARIANTS)
def test_cancelling_sums(variant: str) -> None:
    check_cancelling_sums(VARIANTS[variant], "torch", "cpu", 2000)


@pytest.mark.long
@pytest.mark.parametrize("variant", MAP_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [2, 77, 300])
def test_feature_maps_match_definition(variant: str, dtype: torch.dtype, num_tokens: int) -> None:
    inputs, grad = make_inputs((2, num_tokens, 2, 20, 40), dtype)
    if not bounds_scores(MAP_VARIANTS[variant]):
        inputs = [(x * 0.2 if i < 2 else x).detach().requires_grad_() for i, x in enumerate(inputs)]
    check_against_definition(inputs, grad, "torch", **MAP_VARIANTS[variant])


@pytest.mark.parametrize("variant", [*VARIANTS, *MAP_VARIANTS])
@pytest.mark.parametrize(("cut", "num_tokens"), [(1, 2), (70, 210)])
def test_pieces_match_whole(variant: str, cut: int, num_tokens: int) -> None:
    variants = {**VARIANTS, **MAP_VARIANTS}
    check_pieces_match_whole(variants[variant], "torch", "cpu", cut, num_tokens)


@pytest.mark.parametrize("variant", [*VARIANTS, *MAP_VARIANTS])
def test_sequences_are_independent(variant: str) -> None:
    variants = {**VARIANTS, **MAP_VARIANTS}
    lengths = [1, 0, 150, 40, 0]
    check_sequences_are_independent(variants[variant], "torch", "cpu", lengths)


@pytest.mark.long
@pytest.mark.parametrize("variant", [*VARIANTS, *MAP_VARIANTS])
def test_long_sequences_are_cut_into_pieces(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    monkeypatch.setattr(torch_backend, "MIN_PIECE", 40)
    monkeypatch.setattr(torch_backend, "PIECE_ROWS", 1)
    inputs, grad = make_inputs((1, 150, 2, 20, 24), torch.float32)
    if not bounds_scores(options):
        inputs = [(x * 0.2 if i < 2 else x).detach().requires_grad_() for i, x in enumerate(inputs)]
    check_against_definition(inputs, grad, "torch", **options)
    check_pieces_match_whole(options, "torch", "cpu", 70, 210)
    check_sequences_are_independent(options, "torch", "cpu", [1, 0, 150, 40])


@pytest.mark.parametrize("variant", ["centered", "causal-centered"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 77, 300])
def test_keys_with_a_mean(variant: str, dtype: torch.dtype, num_tokens: int) -> None:
    check_keys_with_a_mean(VARIANTS[variant], dtype, "torch", "cpu", num_tokens)


@pytest.mark.parametrize(("causal", "expected"), [(False, [-0.5, 0.5]), (True, [0.0, 0.5])])
def test_two_centered_keys_have_the_known_output(causal: bool, expected: list[float]) -> None:
    q, k, v = (torch.tensor(x).view(1, 2, 1, 1) for x in ([2.0, 0.0], [1.0, -1.0], [0.0, 1.0]))
    out = linear_attention(q, k, v, causal=causal, **CENTERED | {"qk_scale": 1.0})
    # Scores 2 and -2 of the first query have the mean 0: weights (1 + 2) / 2 and (1 - 2) / 2.
    assert out.flatten().tolist() == expected


@pytest.mark.parametrize("variant", ["centered", "causal-centered"])
def test_centered_weights_of_a_row_sum_to_one(variant: str) -> None:
    (q, k, _), _ = make_inputs((2, 150, 2, 16, 16), torch.float64)
    identity = torch.eye(150, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    weights = linear_attention(q * 4, k * 4, identity, **VARIANTS[variant])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights.min() < 0


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
def test_small_features_keep_their_digits(variant: str) -> None:
    check_small_features(VARIANTS[variant], "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "eq7-quadratic"])
def test_returned_state_may_be_changed_in_place(variant: str) -> None:
    check_changed_state({**VARIANTS, **MAP_VARIANTS}[variant], "torch", "cpu")


@pytest.mark.parametrize("variant", [*VARIANTS, "causal-eq7-relu", "causal-eq4-softplus"])
def test_gradients_of_the_returned_state(variant: str) -> None:
    check_gradients_of_state({**VARIANTS, **MAP_VARIANTS}[variant], "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "causal-centered", "eq4-quadratic"])
def test_transforms_of_torch_func(variant: str) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    check_transforms(partial(linear_attention, backend="torch", **options), "cpu")


@pytest.mark.parametrize("variant", ["eq7", "eq4", "causal-eq7", "causal-eq4", "centered-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows(variant: str, dtype: torch.dtype) -> None:
    check_extreme_rows(VARIANTS[variant], dtype, "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
def test_torch_backend_reads_any_strides(variant: str) -> None:
    check_strides(VARIANTS[variant], "torch", "cpu")


@pytest.mark.long
def test_inductor_takes_a_strided_initial_state() -> None:
    inputs, grad = make_inputs((1, 30, 2, 16, 24), torch.float32)
    _, state = linear_attention(*inputs, return_state=True)
    strided = state.detach().mT.contiguous().mT.requires_grad_()
    assert not strided.is_contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> Tensor:
        return linear_attention(q, k, v, initial_state=initial)

    compiled = torch.compile(attend, fullgraph=True)
    for function in (attend, compiled):
        out = function(*inputs, strided)
        gradients = torch.autograd.grad(out, [*inputs, strided], grad)
        if function is attend:
            expected = out, *gradients
    for value, true in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(value, true)


def test_states_add() -> None:
    """Bidirectional states of disjoint keys, as ranks of a context-parallel group hold them."""
    (q, k, v), _ = make_inputs((1, 90, 2, 16, 16), torch.float32)
    states = [
        linear_attention(q[:, part], k[:, part], v[:, part], return_state=True)[1]
        for part in (slice(0, 30), slice(30, 60), slice(60, 90))
    ]
    whole = linear_attention(q, k, v, return_state=True)[1]
    torch.testing.assert_close(sum(states), whole)
    assert (whole[:, :, 0, -1] == 90).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", ["eq7", "causal-eq4", "centered", "causal-centered", "eq4-quadratic"]
)
def test_gradcheck_of_states(variant: str) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    inputs, _ = make_inputs((2, 6, 1, 3, 2), torch.float64)
    _, state = linear_attention(*inputs, return_state=True, **options)
    number = state[..., :1, -1:].detach().clone()

    def attend(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        # The number of keys is not differentiated.
        first = torch.cat([sums[..., :1, :-1], number], dim=-1)
        initial = torch.cat([first, sums[..., 1:, :]], dim=-2)
        return linear_attention(q, k, v, initial_state=initial, return_state=True, **options)

    torch.autograd.gradcheck(attend, [*inputs, state.detach().requires_grad_()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_garbage_collector(variant: str) -> None:
    inputs, grad = make_inputs((1, 40, 2, 16, 16), torch.float32)

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        with_gradients(linear_attention, inputs, grad, **VARIANTS[variant])
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "eq4-quadratic"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(variant: str, use_reentrant: bool) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    inputs, grad = make_inputs((1, 150, 2, 32, 32), torch.float32)
    plain = with_gradients(linear_attention, inputs, grad, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, **options)

    out = checkpoint(attend, *inputs, use_reentrant=use_reentrant)
    out.backward(grad)
    assert all(map(torch.equal, plain, (out, *(x.grad for x in inputs))))


@pytest.mark.long
@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "eq4-quadratic"])
def test_compiles_to_one_graph_for_all_lengths(variant: str) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, **options) * 2

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
    inputs, _ = make_inputs((1, 20, 2, 16, 16), torch.float32)
    q, k, v = (x.detach() for x in inputs)  # autograd differentiates the function around them
    options = Variant(causal=True, normalized=True)
    arguments = (q, k, v, None, torch.tensor([0, 5, 20]), *options, True, False)
    torch.library.opcheck(torch.ops.linclip.linear_attention, arguments)


@pytest.mark.parametrize("variant", CAUSAL)
@pytest.mark.parametrize("num_tokens", [77, 300])
def test_later_tokens_do_not_matter(variant: str, num_tokens: int) -> None:
    check_later_tokens_do_not_matter(CAUSAL[variant], "torch", "cpu", num_tokens)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_keys_stay_finite(variant: str, dtype: torch.dtype) -> None:
    check_collapsed_keys(VARIANTS[variant], dtype, "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4", "centered", "causal-centered"])
def test_single_key_returns_its_value(variant: str) -> None:
    check_single_key(VARIANTS[variant], "torch", "cpu")


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "eq4-quadratic"])
def test_autocast_casts_as_torch_attention_does(variant: str) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    (q, k, v), grad = make_inputs((1, 150, 2, 32, 32), torch.float32)
    low = [x.bfloat16().detach().requires_grad_() for x in (q, k, v)]
    expected = with_gradients(linear_attention, low, grad.bfloat16(), **options)
    # A norm before attention gives float32 under autocast, a projection bfloat16.
    mixed = [q, k, low[2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(linear_attention, mixed, grad.bfloat16(), **options)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert all(map(torch.equal, (x.float() for x in found), (x.float() for x in expected)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 0, 2, 16)}, "q.shape (2, 0, 2, 16) must be [B, N, H, D]"),
        ({"v": torch.zeros(2, 5, 32)}, "v.shape (2, 5, 32) must be [B, N, H, D]"),
        ({"k": torch.zeros(2, 6, 2, 16)}, "k.shape (2, 6, 2, 16) must equal q.shape (2, 5, 2, 16)"),
        ({"v": torch.zeros(2, 5, 3, 16)}, "v.shape (2, 5, 3, 16) must start with q's [B, N, H]"),
        ({"k": torch.zeros(2, 5, 2, 16).half()}, "k.dtype (torch.float16) must equal q.dtype"),
        ({"q": torch.zeros(2, 5, 2, 16).int()}, "q.dtype (torch.int32) must be a floating type"),
        (
            {"v": torch.zeros(2, 5, 2, 16, device="meta")},
            "v.device (meta) must equal q.device (cpu)",
        ),
        ({"backend": "cuda"}, "backend ('cuda') must be one of auto, torch, triton"),
        (
            {"feature_map": "relu", "centered": True},
            "feature_map ('relu') must be 'affine' when centered",
        ),
        ({"feature_map": "elu"}, "feature_map ('elu') must be one of affine, quadratic"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "q.shape[0] (2) must be 1 when cu_seqlens is given"),
        ({"cu_seqlens": torch.tensor([0.0, 5])}, "cu_seqlens.dtype (torch.float32) must be an int"),
        ({"cu_seqlens": [0, 5.0]}, "cu_seqlens.dtype (torch.float32) must be an integer type"),
        ({"cu_seqlens": [False, True]}, "cu_seqlens.dtype (torch.bool) must be an integer type"),
        ({"cu_seqlens": torch.tensor([5])}, "cu_seqlens.shape (1,) must be [S + 1]"),
        ({"cu_seqlens": []}, "cu_seqlens.shape (0,) must be [S + 1]"),
        ({"cu_seqlens": 5}, "cu_seqlens.shape () must be [S + 1]"),
        ({"cu_seqlens": [[0, 5]]}, "cu_seqlens.shape (1, 2) must be [S + 1]"),
        ({"cu_seqlens": [0, "5"]}, "cu_seqlens ([0, '5']) must be integers"),
        ({"cu_seqlens": [0, None]}, "cu_seqlens ([0, None]) must be integers"),
        ({"cu_seqlens": "05"}, "cu_seqlens ('05') must be integers"),
        ({"cu_seqlens": [0, 2**70]}, "must be integers"),
        (
            {"cu_seqlens": torch.tensor([0, 5], device="meta")},
            "cu_seqlens.device (meta) must be cpu or q.device (cpu)",
        ),
        ({"k": np.zeros((2, 5, 2, 16))}, "k (ndarray) must be a torch.Tensor"),
        (
            {"initial_state": torch.zeros(2, 2, 16, 17)},
            "initial_state.shape (2, 2, 16, 17) must be (2, 2, 17, 17)",
        ),
        (
            {"initial_state": torch.zeros(2, 2, 17, 17).double()},
            "initial_state.dtype (torch.float64) must be torch.float32",
        ),
        ({"backend": "triton"}, "backend ('triton') must have CUDA tensors, not cpu"),
        ({"backend": "triton", "v": torch.zeros(2, 5, 2, 8)}, "v.shape[-1] (8) must be in 16..256"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {name: torch.zeros(2, 5, 2, 16) for name in "qkv"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention(**arguments)


@pytest.mark.parametrize("boundaries", [[0, 4, 4, 10], (0, 4, 4, 10), np.array([0, 4, 4, 10])])
@pytest.mark.parametrize("compiled", [False, True])
def test_boundaries_may_be_any_sequence_of_integers(boundaries: Any, compiled: bool) -> None:
    (q, k, v), _ = make_inputs((1, 10, 2, 16, 16), torch.float32)

    def attend(q: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=True, cu_seqlens=boundaries)

    call = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
    for dtype in (torch.int64, torch.int32, torch.uint8):
        tensor = torch.tensor([0, 4, 4, 10], dtype=dtype)
        assert torch.equal(call(q), linear_attention(q, k, v, causal=True, cu_seqlens=tensor))


@pytest.mark.parametrize("values", [[0, 3], [1, 5], [0, 4, 2, 5], [0, -1, 5], [0, 6, 5]])
@pytest.mark.parametrize("compiled", [False, True])
def test_wrong_boundaries_are_named(values: list[int], compiled: bool) -> None:
    q = torch.zeros(1, 5, 2, 16)

    def attend(boundaries: Tensor) -> Tensor:
        return linear_attention(q, q, q, cu_seqlens=boundaries)

    call = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
    message = f"cu_seqlens {values} must ascend from 0 to N (5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.tensor(values))

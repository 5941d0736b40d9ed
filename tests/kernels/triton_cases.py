"""Tests of the Triton kernels on the device at hand: the interpreter, or a CUDA device.

Not collected by its name: test_triton_interpreter.py runs it in a process of its own, for Triton
reads TRITON_INTERPRET when kernels are defined, and test_triton_gpu.py runs it on the chip.

The interpreter is slow. The tests that are not marked slow cover every kernel, flag, width and
dtype once, with several blocks and several parts; those marked slow cover all combinations.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from helpers.kernel_checks import (
    MAP_VARIANTS,
    VARIANTS,
    bounds_scores,
    check_against_definition,
    check_cancelling_sums,
    check_changed_state,
    check_collapsed_keys,
    check_empty_halves,
    check_extreme_rows,
    check_gradients_of_state,
    check_halves_against_definition,
    check_keys_with_a_mean,
    check_later_tokens_do_not_matter,
    check_nan_stays_where_the_formula_puts_it,
    check_packed_matches_plain,
    check_pieces_match_whole,
    check_sequences_are_independent,
    check_single_key,
    check_single_key_state,
    check_small_features,
    check_strides,
    check_transforms,
    from_state,
    make_inputs,
    with_gradients,
)
from linclip_kernels import linear_attention
from linclip_kernels.linear_attention.triton_backend import backend
from linclip_kernels.linear_attention.triton_backend.partition import Chip, run

#: (N, D, Dv), dtype: every length and width, below and above a block. There are several parts from
#: 512 tokens on.
SHAPES = [
    ((1, 32, 32), torch.float32),
    ((2, 64, 64), torch.bfloat16),
    ((15, 60, 60), torch.float16),
    ((63, 80, 64), torch.float32),
    ((63, 64, 96), torch.bfloat16),
    ((77, 64, 64), torch.bfloat16),
    ((77, 32, 60), torch.float32),
    ((197, 64, 64), torch.float32),
    ((197, 64, 64), torch.bfloat16),
    ((100, 128, 128), torch.bfloat16),
    ((40, 96, 256), torch.float32),
    ((40, 256, 80), torch.bfloat16),
    ((500, 96, 32), torch.bfloat16),
    ((577, 32, 32), torch.float16),
]
#: Those at which the unnormalised variants run by default: they differ from the others in one flag.
FEW_SHAPES = [(1, 32, 32), (15, 60, 60), (63, 80, 64), (77, 64, 64), (500, 96, 32)]
#: Long sequences and wide values, for one variant each to save time.
LONG_SHAPES = [
    ("eq7", (1100, 32, 32), torch.bfloat16),
    ("eq4", (1025, 16, 144), torch.float32),
    pytest.param("causal-eq7", (520, 16, 256), torch.float32, marks=pytest.mark.slow),
    ("causal-eq4", (520, 16, 144), torch.bfloat16),
    ("centered", (1100, 32, 32), torch.bfloat16),
    ("causal-centered", (520, 16, 144), torch.bfloat16),
]
MAIN_VARIANTS = ["eq7", "eq4", "causal-eq7", "causal-eq4", "centered", "causal-centered"]
#: Variants with a norm of q and k.
NORM_VARIANTS = ["eq7", "eq4", "causal-eq7", "causal-eq4", "centered-norm"]
STATE_VARIANTS = [*MAIN_VARIANTS, "eq7-alpha", "causal-eq7-alpha"]
CAUSAL_VARIANTS = [name for name, variant in VARIANTS.items() if variant.get("causal")]


def case(*values: Any, slow: bool) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())


@pytest.fixture
def device() -> str:
    return "cpu" if triton.knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def poisoned_buffers(device: str) -> Iterator[None]:
    """torch.empty gives NaN, so that a row no kernel has written cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("variant", "shape", "dtype"),
    [
        case(variant, shape, dtype, slow="eq7" in variant and shape not in FEW_SHAPES)
        for variant in MAIN_VARIANTS
        for shape, dtype in SHAPES
        if shape[0] <= 256 or "causal" not in variant
    ],
)
def test_kernels_match_definition(
    variant: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_tokens, key_dim, value_dim = shape
    inputs, grad = make_inputs((1, num_tokens, 1, key_dim, value_dim), dtype, device=device)
    check_against_definition(inputs, grad, "triton", **VARIANTS[variant])


@pytest.mark.parametrize(("variant", "shape", "dtype"), LONG_SHAPES)
def test_long_sequences_and_wide_values_match_definition(
    variant: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_tokens, key_dim, value_dim = shape
    inputs, grad = make_inputs((1, num_tokens, 1, key_dim, value_dim), dtype, device=device)
    check_against_definition(inputs, grad, "triton", **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, case(torch.bfloat16, slow=True)])
def test_kernels_read_packed_views(variant: str, dtype: torch.dtype, device: str) -> None:
    qk_norm = bounds_scores(VARIANTS[variant])
    inputs, grad = make_inputs(
        (2, 77, 2, 32, 32), dtype, device=device, packed=True, qk_norm=qk_norm
    )
    assert not inputs[0].is_contiguous()
    check_against_definition(inputs, grad, "triton", **VARIANTS[variant])


@pytest.mark.parametrize(
    ("variant", "num_tokens", "dim", "dtype"),
    [
        ("eq7", 40, 32, torch.bfloat16),
        ("eq7", 5, 144, torch.float32),  # values in several blocks
        ("causal-eq4", 20, 32, torch.float32),
        ("centered", 40, 32, torch.float32),
    ],
)
def test_packed_matches_plain(
    variant: str, num_tokens: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    check_packed_matches_plain(
        VARIANTS[variant], dtype, "triton", device, num_tokens=num_tokens, dim=dim
    )


@pytest.mark.parametrize("variant", MAIN_VARIANTS)
def test_kernels_read_expanded_gradient(variant: str, device: str) -> None:
    inputs, grad = make_inputs((1, 50, 2, 32, 32), torch.float32, device=device)
    check_against_definition(
        inputs, grad[:1, :1, :1, :1].expand_as(grad), "triton", **VARIANTS[variant]
    )


@pytest.mark.slow  # the interpreter runs one program after the other: this is for the device
@pytest.mark.parametrize("variant", MAIN_VARIANTS)
def test_same_bits_twice(variant: str, device: str) -> None:
    num_tokens = 1030
    inputs, grad = make_inputs((1, num_tokens, 1, 32, 32), torch.bfloat16, device=device)
    first = with_gradients(linear_attention, inputs, grad, backend="triton", **VARIANTS[variant])
    second = with_gradients(linear_attention, inputs, grad, backend="triton", **VARIANTS[variant])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("variant", MAP_VARIANTS)
def test_feature_maps_match_definition(variant: str, device: str) -> None:
    dtype = torch.bfloat16 if "softplus" in variant else torch.float32
    inputs, grad = make_inputs((1, 80, 1, 20, 40), dtype, device=device)
    with torch.no_grad():
        for x in inputs[:2] if "raw" in variant or "7-quad" in variant else ():
            x *= 0.2
    check_against_definition(inputs, grad, "triton", **MAP_VARIANTS[variant])


@pytest.mark.parametrize("variant", ["centered", "causal-centered"])
def test_keys_with_a_mean(variant: str, device: str) -> None:
    num_tokens = 600
    check_keys_with_a_mean(VARIANTS[variant], torch.float32, "triton", device, num_tokens)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
def test_small_features_keep_their_digits(variant: str, device: str) -> None:
    check_small_features(VARIANTS[variant], "triton", device)


@pytest.mark.parametrize("variant", ["eq4-relu", "causal-eq4-softplus"])
def test_sequences_with_other_features_are_independent(variant: str, device: str) -> None:
    check_sequences_are_independent(MAP_VARIANTS[variant], "triton", device, [1, 0, 40])


@pytest.mark.parametrize(
    ("variant", "several_parts"),
    [
        *(case(variant, False, slow="eq4" not in variant) for variant in STATE_VARIANTS),
        *(
            case(variant, True, slow=variant not in ("eq4", "causal-eq7-alpha"))
            for variant in STATE_VARIANTS
        ),
    ],
)
def test_pieces_match_whole(variant: str, several_parts: bool, device: str) -> None:
    cut, num_tokens = 520, 560
    if several_parts:
        check_pieces_match_whole(VARIANTS[variant], "triton", device, cut, num_tokens, heads=1)
    else:  # and values in two blocks
        check_pieces_match_whole(VARIANTS[variant], "triton", device, 1, 20, dims=(64, 40))


@pytest.mark.parametrize(
    ("variant", "num_keys", "num_queries", "dims", "dtype"),
    [
        ("eq7", 40, 600, (32, 32), torch.bfloat16),
        ("eq4", 600, 40, (16, 144), torch.float32),
        ("eq7-alpha", 33, 20, (32, 16), torch.float32),
        ("centered", 600, 40, (32, 32), torch.float32),
        ("eq4-relu", 33, 20, (20, 40), torch.float32),
        ("eq4-quadratic", 20, 33, (16, 16), torch.float32),
    ],
)
def test_halves_match_definition(
    variant: str,
    num_keys: int,
    num_queries: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    shape, options = (1, num_keys, 1, *dims), {**VARIANTS, **MAP_VARIANTS}[variant]
    check_halves_against_definition(shape, num_queries, dtype, "triton", device, **options)


@pytest.mark.parametrize("variant", ["eq7", "eq4", "eq4-quadratic"])
def test_empty_halves(variant: str, device: str) -> None:
    check_empty_halves({**VARIANTS, **MAP_VARIANTS}[variant], "triton", device)


@pytest.mark.parametrize("variant", ["eq4", "centered"])
def test_state_of_a_single_key(variant: str, device: str) -> None:
    check_single_key_state(VARIANTS[variant], "triton", device)


@pytest.mark.parametrize(
    ("variant", "lengths"),
    [
        *(case(f, [20, 1, 33], slow=f in ("eq7", "causal-eq7")) for f in STATE_VARIANTS),
        *(case(f, [1, 0, 530, 0], slow="eq4" not in f) for f in STATE_VARIANTS),
    ],
)
def test_sequences_are_independent(variant: str, lengths: list[int], device: str) -> None:
    check_sequences_are_independent(VARIANTS[variant], "triton", device, lengths)


@pytest.mark.parametrize(
    "variant", [case(variant, slow="eq7" in variant) for variant in MAIN_VARIANTS]
)
def test_cancelling_sums(variant: str, device: str) -> None:
    num_tokens = 600 if "causal" in variant else 2000
    check_cancelling_sums(VARIANTS[variant], "triton", device, num_tokens)


@pytest.mark.parametrize("variant", MAIN_VARIANTS)
def test_nan_stays_where_the_formula_puts_it(variant: str, device: str) -> None:
    check_nan_stays_where_the_formula_puts_it(VARIANTS[variant], "triton", device)


@pytest.mark.parametrize("variant", CAUSAL_VARIANTS)
def test_later_tokens_do_not_matter(variant: str, device: str) -> None:
    check_later_tokens_do_not_matter(VARIANTS[variant], "triton", device, 77)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_keys_stay_finite(variant: str, dtype: torch.dtype, device: str) -> None:
    check_collapsed_keys(VARIANTS[variant], dtype, "triton", device)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4", "centered", "causal-centered"])
def test_single_key_returns_its_value(variant: str, device: str) -> None:
    check_single_key(VARIANTS[variant], "triton", device)


@pytest.mark.parametrize("variant", MAIN_VARIANTS)
def test_second_derivative_is_refused(variant: str, device: str) -> None:
    (q, k, v), grad = make_inputs((1, 9, 1, 16, 16), torch.float32, device=device)
    out = linear_attention(q, k, v, backend="triton", **VARIANTS[variant])
    (d_q,) = torch.autograd.grad(out, q, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        d_q.sum().backward()


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4", "causal-centered", "eq4-quadratic"])
def test_transforms_of_torch_func(variant: str, device: str) -> None:
    options = {**VARIANTS, **MAP_VARIANTS}[variant]
    check_transforms(partial(linear_attention, backend="triton", **options), device)


def test_transforms_of_the_halves(device: str) -> None:
    check_transforms(partial(from_state, backend="triton", normalized=True), device)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq7", "eq7-quadratic"])
def test_returned_state_may_be_changed_in_place(variant: str, device: str) -> None:
    check_changed_state({**VARIANTS, **MAP_VARIANTS}[variant], "triton", device)


@pytest.mark.parametrize(
    "variant", ["eq7", "causal-eq7", "causal-eq4", "causal-eq7-relu", "causal-eq4-softplus"]
)
def test_gradients_of_the_returned_state(variant: str, device: str) -> None:
    check_gradients_of_state({**VARIANTS, **MAP_VARIANTS}[variant], "triton", device)


@pytest.mark.parametrize("variant", NORM_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, case(torch.bfloat16, slow=True)])
def test_extreme_rows(variant: str, dtype: torch.dtype, device: str) -> None:
    check_extreme_rows(VARIANTS[variant], dtype, "triton", device)


@pytest.mark.parametrize("variant", ["eq4", "causal-eq4"])
def test_kernels_read_any_strides(variant: str, device: str) -> None:
    check_strides(VARIANTS[variant], "triton", device)


@pytest.mark.parametrize("variant", ["eq7", "causal-eq4"])
def test_compiles_to_one_graph(variant: str, device: str) -> None:
    inputs, grad = make_inputs((1, 20, 1, 16, 16), torch.float32, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, backend="triton", **VARIANTS[variant]) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    plain, found = (with_gradients(f, inputs, grad) for f in (attend, compiled))
    assert all(map(torch.equal, plain, found))


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [(8, torch.float32, "must be in 16..256"), (32, torch.float64, "must not be float64")],
)
def test_refused_inputs(dim: int, dtype: torch.dtype, message: str, device: str) -> None:
    (q, k, v), _ = make_inputs((1, 9, 1, dim, dim), dtype, device=device)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("variant", ["eq7", "eq4", "causal-eq7-alpha"])
def test_repeated_plans_give_the_bits_of_new_ones(
    variant: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that a plan is kept for, and calls that differ from them in one property."""
    options: dict[str, Any] = VARIANTS[variant] | {"backend": "triton", "return_state": True}
    calls = list(_calls_alike(device))

    def results() -> list[Tensor]:
        found = []
        for (q, k, v), initial in calls:
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            inputs += [] if initial is None else [initial.requires_grad_()]
            outputs = linear_attention(*inputs[:3], initial_state=initial, **options)
            grads = [torch.linspace(-1, 1, x.numel()).to(x).view(x.shape) for x in outputs]
            found += [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
        return found

    repeated = results()

    def plan_and_run(planner: Any, tensors: Any, *options: Any, boundaries: Any = None) -> Any:
        chip = Chip.of(torch.device(device))
        filled, launches = planner(*tensors, *options, boundaries=boundaries, chip=chip)
        run(launches, tensors[0].device)
        return filled

    monkeypatch.setattr(backend, "launch", plan_and_run)
    assert all(map(torch.equal, repeated, results()))


def _calls_alike(device: str) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Yield q, k, v and an initial state."""
    shape = 2, 20, 2, 16, 16
    for seed in (0, 1):
        for packed in (False, True):
            yield (
                make_inputs(shape, torch.bfloat16, device=device, packed=packed, seed=seed)[0],
                None,
            )
    (q, k, v), _ = make_inputs(shape, torch.bfloat16, device=device)
    yield [q, q, v], None
    yield [q, k, k], None
    shifted = torch.cat([q.detach().flatten(), q.detach().flatten()[:1]])[1:].view(q.shape)
    assert q.data_ptr() % 16 == 0 != shifted.data_ptr() % 16
    yield [shifted, k, v], None
    yield [x.float() for x in (q, k, v)], None
    yield [x[:, :13] for x in (q, k, v)], None
    for seed in (2, 3):
        yield [q, k, v], torch.rand(2, 2, 17, 17, device=device) + seed

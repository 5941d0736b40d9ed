"""Tests of the Triton kernels on the device at hand: the interpreter, or a CUDA device.

Not collected by its name: test_triton_interpreter.py runs it in a process of its own, for Triton
reads TRITON_INTERPRET when kernels are defined, and test_triton_gpu.py runs it on the chip.

The interpreter is slow. What is not marked slow has every kernel, flag, width and dtype once, with
several blocks and several parts; what is marked has them in all combinations.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from helpers.kernel_checks import (
    FORMS,
    MAP_FORMS,
    check_against_definition,
    check_cancelling_sums,
    check_collapsed_keys,
    check_empty_halves,
    check_halves_against_definition,
    check_later_tokens_do_not_matter,
    check_nan_stays_where_the_formula_puts_it,
    check_sequences_stand_alone,
    check_single_key,
    check_single_key_state,
    check_small_features,
    check_states_carry_on,
    make_inputs,
    with_gradients,
)
from linclip_kernels import linear_attention

#: (N, D, Dv), dtype: every length and width, short and long of a block. Several parts: causal from
#: 257 tokens on, bidirectional from 513 tokens on.
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
#: Of these, the ones at which the unnormalised forms run by default: they differ in one flag.
FEW_SHAPES = [(1, 32, 32), (15, 60, 60), (63, 80, 64), (77, 64, 64), (500, 96, 32)]
#: These forms only, to save time.
LONG_SHAPES = [
    ("eq7", (1100, 32, 32), torch.bfloat16),
    ("eq4", (1025, 16, 144), torch.float32),
    pytest.param("causal-eq7", (300, 16, 256), torch.float32, marks=pytest.mark.slow),
    ("causal-eq4", (270, 16, 144), torch.bfloat16),
]
MAIN_FORMS = ["eq7", "eq4", "causal-eq7", "causal-eq4"]
STATE_FORMS = [*MAIN_FORMS, "eq7-alpha", "causal-eq7-alpha"]
CAUSAL_FORMS = [name for name, form in FORMS.items() if form.get("causal")]


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
    ("form", "shape", "dtype"),
    [
        case(form, shape, dtype, slow="eq7" in form and shape not in FEW_SHAPES)
        for form in MAIN_FORMS
        for shape, dtype in SHAPES
        if shape[0] <= 256 or "causal" not in form
    ],
)
def test_kernels_match_definition(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_tokens, key_dim, value_dim = shape
    inputs, grad = make_inputs((1, num_tokens, 1, key_dim, value_dim), dtype, device=device)
    check_against_definition(inputs, grad, "triton", **FORMS[form])


@pytest.mark.parametrize(("form", "shape", "dtype"), LONG_SHAPES)
def test_long_sequences_and_wide_values_match_definition(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    num_tokens, key_dim, value_dim = shape
    inputs, grad = make_inputs((1, num_tokens, 1, key_dim, value_dim), dtype, device=device)
    check_against_definition(inputs, grad, "triton", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, case(torch.bfloat16, slow=True)])
def test_kernels_read_packed_views(form: str, dtype: torch.dtype, device: str) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, grad = make_inputs(
        (2, 77, 2, 32, 32), dtype, device=device, packed=True, qk_norm=qk_norm
    )
    assert not inputs[0].is_contiguous()
    check_against_definition(inputs, grad, "triton", **FORMS[form])


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_kernels_read_expanded_gradient(form: str, device: str) -> None:
    inputs, grad = make_inputs((1, 50, 2, 32, 32), torch.float32, device=device)
    check_against_definition(inputs, grad[:1, :1, :1, :1].expand_as(grad), "triton", **FORMS[form])


@pytest.mark.slow  # the interpreter runs one program after the other: this is for the device
@pytest.mark.parametrize("form", MAIN_FORMS)
def test_same_bits_twice(form: str, device: str) -> None:
    num_tokens = 300 if "causal" in form else 1030
    inputs, grad = make_inputs((1, num_tokens, 1, 32, 32), torch.bfloat16, device=device)
    first = with_gradients(linear_attention, inputs, grad, backend="triton", **FORMS[form])
    second = with_gradients(linear_attention, inputs, grad, backend="triton", **FORMS[form])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", MAP_FORMS)
def test_feature_maps_match_definition(form: str, device: str) -> None:
    dtype = torch.bfloat16 if "softplus" in form else torch.float32
    inputs, grad = make_inputs((1, 80, 1, 20, 40), dtype, device=device)
    with torch.no_grad():
        for x in inputs[:2] if "raw" in form or "7-quad" in form else ():
            x *= 0.2
    check_against_definition(inputs, grad, "triton", **MAP_FORMS[form])


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
def test_small_features_keep_their_digits(form: str, device: str) -> None:
    check_small_features(FORMS[form], "triton", device)


@pytest.mark.parametrize("form", ["eq4-relu", "causal-eq4-softplus"])
def test_sequences_with_other_features_stand_alone(form: str, device: str) -> None:
    check_sequences_stand_alone(MAP_FORMS[form], "triton", device, [1, 0, 40])


@pytest.mark.parametrize(
    ("form", "several_parts"),
    [
        *(case(form, False, slow="eq4" not in form) for form in STATE_FORMS),
        *(case(form, True, slow=form not in ("eq4", "causal-eq7-alpha")) for form in STATE_FORMS),
    ],
)
def test_states_carry_on(form: str, several_parts: bool, device: str) -> None:
    cut, num_tokens = (260, 275) if "causal" in form else (520, 560)
    if several_parts:
        check_states_carry_on(FORMS[form], "triton", device, cut, num_tokens, heads=1)
    else:  # and values in two blocks
        check_states_carry_on(FORMS[form], "triton", device, 1, 20, dims=(64, 40))


@pytest.mark.parametrize(
    ("form", "num_keys", "num_queries", "dims", "dtype"),
    [
        ("eq7", 40, 600, (32, 32), torch.bfloat16),
        ("eq4", 600, 40, (16, 144), torch.float32),
        ("eq7-alpha", 33, 20, (32, 16), torch.float32),
        ("eq4-relu", 33, 20, (20, 40), torch.float32),
        ("eq4-quadratic", 20, 33, (16, 16), torch.float32),
    ],
)
def test_halves_match_definition(
    form: str,
    num_keys: int,
    num_queries: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    shape, options = (1, num_keys, 1, *dims), {**FORMS, **MAP_FORMS}[form]
    check_halves_against_definition(shape, num_queries, dtype, "triton", device, **options)


@pytest.mark.parametrize("form", ["eq7", "eq4", "eq4-quadratic"])
def test_empty_halves(form: str, device: str) -> None:
    check_empty_halves({**FORMS, **MAP_FORMS}[form], "triton", device)


def test_state_of_a_single_key(device: str) -> None:
    check_single_key_state("triton", device)


@pytest.mark.parametrize(
    ("form", "lengths"),
    [
        *(case(f, [20, 1, 33], slow=f in ("eq7", "causal-eq7")) for f in STATE_FORMS),
        *(case(f, [1, 0, 270, 0], slow="eq4" not in f) for f in STATE_FORMS),
    ],
)
def test_sequences_stand_alone(form: str, lengths: list[int], device: str) -> None:
    check_sequences_stand_alone(FORMS[form], "triton", device, lengths)


@pytest.mark.parametrize("form", [case(form, slow="eq7" in form) for form in MAIN_FORMS])
def test_cancelling_sums(form: str, device: str) -> None:
    num_tokens = 600 if "causal" in form else 2000
    check_cancelling_sums(FORMS[form], "triton", device, num_tokens)


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_nan_stays_where_the_formula_puts_it(form: str, device: str) -> None:
    check_nan_stays_where_the_formula_puts_it(FORMS[form], "triton", device)


@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_later_tokens_do_not_matter(form: str, device: str) -> None:
    check_later_tokens_do_not_matter(FORMS[form], "triton", device, 77)


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_keys_stay_finite(form: str, dtype: torch.dtype, device: str) -> None:
    check_collapsed_keys(FORMS[form], dtype, "triton", device)


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
def test_single_key_returns_its_value(form: str, device: str) -> None:
    check_single_key(FORMS[form], "triton", device)


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_second_derivative_is_refused(form: str, device: str) -> None:
    (q, k, v), grad = make_inputs((1, 9, 1, 16, 16), torch.float32, device=device)
    out = linear_attention(q, k, v, backend="triton", **FORMS[form])
    (d_q,) = torch.autograd.grad(out, q, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        d_q.sum().backward()


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [(8, torch.float32, "must be in 16..256"), (32, torch.float64, "must not be float64")],
)
def test_refused_inputs(dim: int, dtype: torch.dtype, message: str, device: str) -> None:
    (q, k, v), _ = make_inputs((1, 9, 1, dim, dim), dtype, device=device)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, backend="triton")

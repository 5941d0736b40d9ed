"""Tests of the Triton kernels on the device at hand: the interpreter, or a CUDA device.

Not collected by its name: test_triton_interpreter.py runs it in a process of its own, for Triton
reads TRITON_INTERPRET when kernels are defined, and test_triton_gpu.py runs it on the chip.
"""

from collections.abc import Iterator

import pytest
import torch
import triton
from kernel_checks import (
    FORMS,
    check_against_definition,
    check_collapsed_keys,
    check_later_tokens_do_not_matter,
    check_nan_stays_in_its_head,
    check_single_key,
    make_inputs,
    with_gradients,
)

from linclip_kernels import linear_attention

#: (N, D, Dv), dtype: every length and width, short and long of a block; from 1025 several parts.
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
    ((70, 96, 256), torch.float32),
    ((40, 256, 80), torch.bfloat16),
    ((500, 96, 32), torch.bfloat16),
    ((577, 32, 32), torch.float16),
    ((1100, 32, 32), torch.bfloat16),
    ((1025, 16, 144), torch.float32),
]
MAIN_FORMS = ["eq7", "eq4", "causal-eq7", "causal-eq4"]
CAUSAL_FORMS = [name for name, form in FORMS.items() if form.get("causal")]


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


@pytest.mark.parametrize("form", MAIN_FORMS)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_kernels_match_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str, device: str
) -> None:
    num_tokens, key_dim, value_dim = shape
    inputs, grad = make_inputs((1, num_tokens, 1, key_dim, value_dim), dtype, device=device)
    check_against_definition(inputs, grad, "triton", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_read_packed_views(form: str, dtype: torch.dtype, device: str) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, grad = make_inputs(
        (2, 77, 3, 32, 32), dtype, device=device, packed=True, qk_norm=qk_norm
    )
    assert not inputs[0].is_contiguous()
    check_against_definition(inputs, grad, "triton", **FORMS[form])


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_kernels_read_expanded_gradient(form: str, device: str) -> None:
    inputs, grad = make_inputs((1, 50, 2, 32, 32), torch.float32, device=device)
    check_against_definition(inputs, grad[:1, :1, :1, :1].expand_as(grad), "triton", **FORMS[form])


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_same_bits_twice(form: str, device: str) -> None:
    inputs, grad = make_inputs((1, 1030, 1, 32, 32), torch.bfloat16, device=device)
    first = with_gradients(linear_attention, inputs, grad, backend="triton", **FORMS[form])
    second = with_gradients(linear_attention, inputs, grad, backend="triton", **FORMS[form])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", MAIN_FORMS)
def test_nan_stays_in_its_head(form: str, device: str) -> None:
    check_nan_stays_in_its_head(FORMS[form], "triton", device)


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
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_q.sum().backward()


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [(8, torch.float32, "must be in 16..256"), (32, torch.float64, "must not be float64")],
)
def test_refused_inputs(dim: int, dtype: torch.dtype, message: str, device: str) -> None:
    (q, k, v), _ = make_inputs((1, 9, 1, dim, dim), dtype, device=device)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, backend="triton")

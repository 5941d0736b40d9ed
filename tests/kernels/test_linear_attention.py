"""The torch form and the public function against the definition."""

import itertools
import re

import pytest
import torch
from kernel_checks import (
    FORMS,
    check_against_definition,
    check_collapsed_keys,
    check_later_tokens_do_not_matter,
    check_nan_stays_in_its_head,
    check_single_key,
    make_inputs,
    relative_rms,
    with_gradients,
)

from linclip_kernels import linear_attention, linear_attention_reference

CAUSAL = {name: form for name, form in FORMS.items() if form.get("causal")}
LENGTHS = (1, 2, 15, 63, 77, 197, 500, 577, 1025)
DIMS = (32, 60, 64, 80, 96, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Every length with every dtype, the widths in turn.
SHAPES = [
    (length, dtype, DIMS[i % len(DIMS)])
    for i, (length, dtype) in enumerate(itertools.product(LENGTHS, DTYPES))
]


@pytest.mark.parametrize("form", ["eq7", "eq4", "causal-eq7", "causal-eq4"])
@pytest.mark.parametrize(("num_tokens", "dtype", "dim"), SHAPES)
def test_torch_form_matches_definition(
    num_tokens: int, dtype: torch.dtype, dim: int, form: str
) -> None:
    inputs, grad = make_inputs((1, num_tokens, 2, dim, dim), dtype)
    check_against_definition(inputs, grad, "torch", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value_dim", [24, 96])
def test_torch_form_with_other_value_width(form: str, value_dim: int) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, grad = make_inputs((2, 150, 2, 48, value_dim), torch.float32, qk_norm=qk_norm)
    check_against_definition(inputs, grad, "torch", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_torch_form_reads_packed_views(form: str) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, grad = make_inputs((2, 65, 3, 32, 32), torch.float32, packed=True, qk_norm=qk_norm)
    assert not inputs[0].is_contiguous()
    check_against_definition(inputs, grad, "torch", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 5, 130])  # 130: several causal tiles, the last one short
def test_gradcheck(form: str, num_tokens: int) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, _ = make_inputs((1, num_tokens, 1, 2, 1), torch.float64, qk_norm=qk_norm)
    torch.autograd.gradcheck(
        lambda q, k, v: linear_attention(q, k, v, **FORMS[form]), inputs, fast_mode=num_tokens > 5
    )


@pytest.mark.parametrize("form", FORMS)
def test_float64_is_computed_in_float64(form: str) -> None:
    qk_norm = FORMS[form].get("qk_norm", True)
    inputs, grad = make_inputs((2, 150, 2, 16, 24), torch.float64, qk_norm=qk_norm)
    found = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    truth = with_gradients(linear_attention_reference, inputs, grad, **FORMS[form])
    assert max(map(relative_rms, found, truth)) < 1e-13


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
def test_clamped_denominator_passes_no_gradient(form: str) -> None:
    inputs, grad = make_inputs((1, 20, 1, 8, 8), torch.float64)
    direction = 10 * inputs[0][:, :1].detach()
    q = direction.expand_as(inputs[0]).clone().requires_grad_()
    k = (-direction).expand_as(inputs[1]).clone().requires_grad_()
    inputs = [q, k, inputs[2]]
    found = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    truth = with_gradients(linear_attention_reference, inputs, grad, **FORMS[form])
    assert max(map(relative_rms, found, truth)) < 1e-6  # 1 - |q|^2 keeps few of its digits


@pytest.mark.parametrize("form", FORMS)
def test_second_derivative_is_refused(form: str) -> None:
    (q, k, v), grad = make_inputs((1, 9, 1, 16, 16), torch.float32)
    out = linear_attention(q, k, v, **FORMS[form])
    (d_q,) = torch.autograd.grad(out, q, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_q.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [77, 300])
def test_same_bits_twice(form: str, num_tokens: int) -> None:
    inputs, grad = make_inputs((2, num_tokens, 2, 32, 32), torch.float32)
    first = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    second = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_head(form: str) -> None:
    check_nan_stays_in_its_head(FORMS[form], "torch", "cpu")


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("num_tokens", [77, 300])
def test_later_tokens_do_not_matter(form: str, num_tokens: int) -> None:
    check_later_tokens_do_not_matter(CAUSAL[form], "torch", "cpu", num_tokens)


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_keys_stay_finite(form: str, dtype: torch.dtype) -> None:
    check_collapsed_keys(FORMS[form], dtype, "torch", "cpu")


@pytest.mark.parametrize("form", ["eq4", "causal-eq4"])
def test_single_key_returns_its_value(form: str) -> None:
    check_single_key(FORMS[form], "torch", "cpu")


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_lower_the_precision(form: str) -> None:
    inputs, grad = make_inputs((1, 150, 2, 32, 32), torch.float32)
    outside = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(linear_attention, inputs, grad, **FORMS[form])
    assert all(map(torch.equal, outside, inside))


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
        ({"backend": "cuda"}, "backend ('cuda') must be"),
        ({"backend": "triton"}, "backend ('triton') must have CUDA tensors, not cpu"),
        ({"backend": "triton", "v": torch.zeros(2, 5, 2, 8)}, "v.shape[-1] (8) must be in 16..256"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {name: torch.zeros(2, 5, 2, 16) for name in "qkv"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention(**arguments)

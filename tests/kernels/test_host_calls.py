"""The operator's work on the host in function calls; kernels are compiled, and not launched."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from benchmarks.attention.bench_host import CASES, count_calls, fake_launches, make_calls
from linclip_kernels.linear_attention.triton_backend import backend, bidirectional
from linclip_kernels.linear_attention.triton_backend.partition import Chip, Launch
from linclip_kernels.linear_attention.triton_backend.replay import MAX_PLANS, launch
from linclip_kernels.linear_attention.variant import Variant

#: The most function calls beyond an empty custom operator, and of the backend alone, in a forward
#: and in a forward with its backward. A launch makes 14, planning and binding again hundreds.
CEILINGS = {
    "Eq. 7, N = 197": {"forward": (160, 57), "both": (240, 128)},
    "Eq. 7, N = 4096": {"forward": (190, 88), "both": (302, 192)},
    "Eq. 7, causal, 1/sqrt(n), N = 77": {"forward": (163, 60), "both": (245, 135)},
    "Eq. 7, causal, N = 4096": {"forward": (188, 85), "both": (335, 225)},
}
#: Places in the arguments of a launcher: the compiled kernel, a value for profilers that is removed
#: here, and then the kernel's first argument.
FUNCTION, METADATA, FIRST = 4, 6, 8


@pytest.mark.long
@pytest.mark.parametrize("name", CEILINGS)
def test_few_function_calls(name: str) -> None:
    with fake_launches():
        calls = make_calls(CASES[name])
        for call in calls.values():
            call()
            call()
        counts = {what: count_calls(call) for what, call in calls.items()}
    for direction, (operator, alone) in CEILINGS[name].items():
        assert counts[f"operator, {direction}"] - counts[f"empty, {direction}"] <= operator
        assert counts[f"backend, {direction}"] <= alone


@pytest.mark.long
def test_repeated_launch_passes_what_triton_passes() -> None:
    """The compiled kernel, called by itself, gets what it gets from JITFunction."""
    variant, (q, k, v, out) = Variant(causal=True, length_exponent=0.5), make_tensors(4)
    factors = torch.ones(2, 77)

    def launched(*tensors: Tensor | None) -> tuple[Any, ...]:
        launch(backend._plan_forward, tensors, variant, False)
        arguments = list(driver.last_launch)
        del arguments[METADATA]
        return tuple(arguments)

    with fake_launches() as driver:
        bound = launched(q, k, v, None, factors, out)
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("binds again")):
            repeated = launched(q, k, v, None, factors, out)
            exchanged = launched(v, q, q, None, factors, out)
        (unaligned,) = make_tensors(1, offset=1)
        compiled = launched(unaligned, k, v, None, factors, out)[FUNCTION]
    assert same(repeated, bound)
    assert exchanged[FUNCTION] is bound[FUNCTION]
    assert compiled is not bound[FUNCTION]
    assert all(view[0] is x for view, x in zip(exchanged[FIRST:], (v, q, q), strict=False))


def make_tensors(count: int, *, offset: int = 0) -> list[Tensor]:
    """Return tensors [2, 77, 2, 64] that begin so many elements after an aligned address."""
    shape = 2, 77, 2, 64
    size = torch.Size(shape).numel()
    return [
        torch.zeros(offset + size, dtype=torch.bfloat16)[offset:].view(shape) for _ in range(count)
    ]


def same(x: Any, y: Any) -> bool:
    """Return whether values are the same, tensors by identity; a named tuple counts as a tuple."""
    if isinstance(x, tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x is y if isinstance(x, Tensor) else bool(x == y)


def test_planned_once_for_every_kind_of_call() -> None:
    """Meta tensors suffice: they are planned like others, and not launched."""
    qkv = torch.empty(3, 2, 79, 3, 16, dtype=torch.bfloat16, device="meta")
    variant = Variant(score_scale=0.123)
    with mock.patch.object(bidirectional, "plan_forward", return_value=[]) as plan:

        def num_plans(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> int:
            backend.forward(q, k, v, None, None, variant._replace(**changes), return_state=False)
            return plan.call_count

        q, k, v = qkv
        assert num_plans(q, k, v) == 1
        assert num_plans(*torch.empty_like(qkv)) == 1
        assert num_plans(v, k, q) == 1
        assert num_plans(q, k, v, normalized=True) == 2
        assert num_plans(q, k, v, score_scale=0.5) == 3
        assert num_plans(*qkv.float()) == 4
        assert num_plans(*qkv[:, :, :78]) == 5  # other lengths and strides
        assert num_plans(*(x.mT.contiguous().mT for x in qkv)) == 6
        assert num_plans(q, k, v) == 6


def test_boundaries_are_planned_at_every_call() -> None:
    q, k, v = torch.empty(3, 1, 79, 3, 16, dtype=torch.bfloat16, device="meta")
    with mock.patch.object(bidirectional, "plan_forward", return_value=[]) as plan:
        for boundaries in ([0, 79], [0, 9, 79], [0, 79]):
            backend.forward(q, k, v, None, boundaries, Variant(), return_state=False)
    assert plan.call_count == 3


def test_tables_of_length_factors_are_kept_on_the_default_stream_alone() -> None:
    """On another one they may lie in the memory of a CUDA graph, and not be filled yet."""
    variant = Variant(causal=True, length_exponent=0.75)
    made = mock.Mock(wraps=backend._kept_causal_factors)
    with FakeTensorMode(), mock.patch.object(backend, "_kept_causal_factors", made):
        q = torch.empty(2, 19, 3, 16, device="cuda")
        for stream, kept in ((0, 1), (7, 1), (7, 1), (0, 2)):
            current = SimpleNamespace(cuda_stream=stream)
            with mock.patch.object(torch.cuda, "current_stream", return_value=current):
                factors = backend._length_factors(q, None, None, variant)
            assert factors is not None
            assert factors.shape == (2, 19)
            assert made.call_count == kept
    backend._kept_causal_factors.cache_clear()


def test_few_plans_are_kept() -> None:
    planned = []

    def planner(x: Tensor, option: int, *, boundaries: None, chip: Chip) -> Any:
        planned.append(option)
        return torch.empty(option + 1, device=x.device), []

    x = torch.empty(2, device="meta")
    for option in (*range(MAX_PLANS + 1), MAX_PLANS, 0):
        assert launch(planner, (x,), option).shape == (option + 1,)
    assert planned == [*range(MAX_PLANS + 1), 0]


@pytest.mark.parametrize(
    ("argument", "rule"),
    [
        (lambda x: x[1:], "no parts"),
        (lambda x: torch.empty_like(x)[1:], "no parts"),
        (lambda x: (torch.empty_like(x)[:1], 1), "whole"),
        (lambda _: torch.empty(2), "keeps no tensors"),
        (lambda x: (1, (x, 2)), "only numbers"),
        (lambda x: SimpleNamespace(base=x), "only numbers"),
    ],
)
def test_plans_that_cannot_be_repeated_are_refused(argument: Any, rule: str) -> None:
    """A tensor that a call cannot replace would be that of the first call, permanently."""

    def planner(x: Tensor, *, boundaries: None, chip: Chip) -> tuple[None, list[Launch]]:
        kernel = SimpleNamespace(arg_names=["argument"])
        return None, [Launch(kernel, (1,), {"argument": argument(x)})]

    with pytest.raises(AssertionError, match=rule):
        launch(planner, (torch.empty(2),))


def test_slower_paths_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Wide or float32 heads, and rows that do not begin at multiples of 16 bytes."""

    def attend(x: Tensor) -> None:
        variant = Variant(score_scale=0.123)
        backend.forward(x, x, x, None, None, variant, return_state=False)

    shape = 1, 40, 2, 64
    fast = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    attend(fast)
    assert not caplog.records
    for _ in range(2):
        attend(torch.empty(1, 40, 2, 112, dtype=torch.bfloat16, device="meta"))
    (wide,) = caplog.records
    assert "heads of 112 with values of 112 in torch.bfloat16" in wide.getMessage()
    caplog.clear()
    for _ in range(2):
        attend(fast.new_empty(1, 40, 2, 65)[..., :64])
    assert len(caplog.records) == 3  # q, k and v
    assert "does not allow accesses of 16 bytes" in caplog.text

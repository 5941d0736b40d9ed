"""The operator's time on the host, before the GPU begins; no GPU is needed: ``make bench-host``.

The kernels are compiled for an H100 and launched by a function that does nothing, on small tensors
of the CPU. Prints the median time and the number of function calls of the public operator, of its
Triton backend alone, and of empty custom operators of the same signatures; "both" is a forward and
a backward.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from linclip_kernels import linear_attention
from linclip_kernels.linear_attention import validation
from linclip_kernels.linear_attention.triton_backend import backend
from linclip_kernels.linear_attention.variant import VARIANT_SCHEMA, Variant

__all__ = ["CASES", "Case", "FakeDriver", "count_calls", "fake_launches", "make_calls"]

HEAD_DIM = 64
#: [B, N, H] and options of the operator.
Case = tuple[tuple[int, int, int], dict[str, Any]]
#: Small tensors, because the allocator of the CPU, unlike that of CUDA, takes long for large ones.
CASES: dict[str, Case] = {
    "Eq. 7, N = 197": ((2, 197, 2), {}),
    "Eq. 4, N = 197": ((2, 197, 2), {"normalized": True}),
    "Eq. 7, N = 4096": ((2, 4096, 2), {}),
    "Eq. 4, N = 4096": ((2, 4096, 2), {"normalized": True}),
    "Eq. 7, causal, N = 77": ((2, 77, 2), {"causal": True}),
    "Eq. 4, causal, N = 77": ((2, 77, 2), {"causal": True, "normalized": True}),
    "Eq. 7, causal, 1/sqrt(n), N = 77": ((2, 77, 2), {"causal": True, "length_exponent": 0.5}),
    "Eq. 7, causal, N = 4096": ((2, 4096, 2), {"causal": True}),
}


class FakeDriver:
    """A driver of Triton that compiles for an H100 and launches nothing.

    Attributes:
        last_launch: The arguments of the last launch.
    """

    def __init__(self) -> None:
        properties = {"max_shared_mem": 232448}
        self.last_launch: tuple[Any, ...] = ()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda _device: properties,
        )

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.last_launch = arguments

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "no device"  # the key of Triton's cache, so that no kernel for a GPU is replaced

    def get_current_stream(self, _device: Any) -> int:
        return 0


#: The only one, because a compiled kernel keeps the launcher that it got first.
_DRIVER = FakeDriver()


@contextmanager
def fake_launches() -> Iterator[FakeDriver]:
    """Let the Triton kernels take CPU tensors, which they do not touch; gives the driver."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_DRIVER)
    try:
        # With this the check of the arguments' device passes; nothing else reads it.
        with mock.patch.object(validation, "_interprets_kernels", _yes):
            yield _DRIVER
    finally:
        triton.runtime.driver.set_active(before)


def _yes() -> bool:
    return True


def count_calls(call: Callable[[], object]) -> int:
    """Return how many functions, in Python and built in, one call calls on this thread."""
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # the last one is setprofile


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? initial, Tensor? cu_seqlens"


@torch.library.custom_op(
    "linclip_bench::empty",
    mutates_args=(),
    schema=f"({_INPUTS}, {VARIANT_SCHEMA}, bool return_state, bool use_triton) -> (Tensor, Tensor)",
)
def _empty(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(v.shape, dtype=v.dtype), q.new_empty(0, dtype=torch.float32)


@torch.library.custom_op(
    "linclip_bench::empty_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? state, Tensor? grad, Tensor? grad_state, {VARIANT_SCHEMA}, "
    "bool use_triton) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _empty_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in inputs[:3])
    return d_q, d_k, d_v, d_q.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, grad_state: Tensor | None) -> tuple[Any, ...]:
    *options, _return_state, use_triton = ctx.options
    d_q, d_k, d_v, _ = _empty_backward(*ctx.saved_tensors, grad, grad_state, *options, use_triton)
    return d_q, d_k, d_v, *(None,) * (2 + len(ctx.options))


_empty.register_autograd(_differentiate, setup_context=_save)


def make_calls(case: Case) -> dict[str, Callable[[], object]]:
    """Return what is measured for a case, by name."""
    (batch, num_tokens, heads), options = case
    qkv = torch.zeros(batch, num_tokens, heads, 3, HEAD_DIM, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(3))
    grad, variant = torch.zeros_like(v, memory_format=torch.contiguous_format), Variant(**options)

    def keeps_state() -> bool:
        return not variant.causal and num_tokens >= 8 * HEAD_DIM

    def forward() -> Tensor:
        return linear_attention(q, k, v, backend="triton", **options)

    def empty() -> Tensor:
        return _empty(q, k, v, None, None, *variant, False, True)[0]

    def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
        def called() -> object:
            with torch.no_grad():
                return call()

        return called

    def with_gradients(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), grad)

    def backend_forward() -> Any:
        return backend.forward(q, k, v, None, None, variant, return_state=keeps_state())

    def backend_both() -> None:
        _, state = backend_forward()
        d_q, d_k, d_v = map(torch.empty_like, (q, k, v))
        backend.backward(q, k, v, None, None, variant, state, grad, None, (d_q, d_k, d_v))

    return {
        "empty, forward": without_gradients(empty),
        "operator, forward": without_gradients(forward),
        "backend, forward": without_gradients(backend_forward),
        "empty, both": with_gradients(empty),
        "operator, both": with_gradients(forward),
        "backend, both": without_gradients(backend_both),
    }


def median_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median over the repeats, after a tenth as many to warm up."""
    for _ in range(max(3, repeats // 10)):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return median(times) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'case':34}{'what':20}{'us':>8}{'beyond empty':>14}{'calls':>8}")
    with fake_launches():
        for name, case in CASES.items():
            if arguments.match not in name:
                continue
            calls = make_calls(case)
            times = {
                what: median_microseconds(call, arguments.repeats) for what, call in calls.items()
            }
            for what, call in calls.items():
                kind, direction = what.split(", ")
                beyond = times[what] - times[f"empty, {direction}"]
                shown = f"{beyond:14.1f}" if kind == "operator" else f"{'':14}"
                count = count_calls(call)
                print(f"{name:34}{what:20}{times[what]:8.1f}{shown}{count:8}", flush=True)


if __name__ == "__main__":
    main()

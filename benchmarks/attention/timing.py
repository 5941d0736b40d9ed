"""How the benchmark times: sizes, predictions, budgets, and the calls themselves."""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.report import WORKS, Row

__all__ = ["FAILED", "HEAD_DIM", "TIMING", "Bench", "Implementation", "batch_and_heads"]

HEAD_DIM, NUM_HEADS = 64, 16
#: (up to this many tokens, B * H): enough work at every length.
STREAMS = {
    "cuda": ((197, 4096), (577, 1024), (4096, 256), (16_384, 64), (float("inf"), 16)),
    "cpu": ((77, 64), (197, 32), (577, 16), (1025, 8), (4096, 4), (16_384, 2), (float("inf"), 1)),
}
#: Minimum traffic in tensors of B * N * H * D elements: q, k, v -> o, and in the backward
#: q, do -> dq and k, v -> dk, dv.
TENSORS = {"forward": 4, "forward+backward": 4 + 7}
#: Of the copy that gives the bandwidth; far beyond any cache.
COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
#: Tensors of B * N * H * D elements for which there must be room on a CPU, in half the memory.
CPU_TENSORS = 24
#: Longest predicted time of one call that is still measured, and of all calls of one point.
POINT_SECONDS = 15.0
#: Calls longer than this are not warmed up, and on a GPU timed three times at most.
SLOW_SECONDS = 0.5
#: GPU: calls shorter than this are timed in a captured graph, without the gaps between launches.
SHORT_SECONDS = 5e-3
#: CPU: time for the rounds over all implementations at one length, where calls are short.
GROUP_SECONDS = 3.0
#: How the reason begins where a call did not run through.
FAILED = "failed"
TIMING = {
    "cuda": "median; calls under 5 ms are replayed from a CUDA graph (do_bench_cudagraph), "
    "longer ones timed by do_bench, which clears the L2 cache before each",
    "cpu": "round robin over the implementations, median; {threads} thread(s)",
}


def batch_and_heads(device: str, num_tokens: int) -> tuple[int, int]:
    """B and H of the inputs of this length."""
    streams = next(streams for limit, streams in STREAMS[device] if num_tokens <= limit)
    heads = min(NUM_HEADS, streams)
    return streams // heads, heads


@dataclass(frozen=True)
class Implementation:
    name: str
    family: str  # "linclip", "sdpa" or "other"
    function: Callable[[Tensor, Tensor, Tensor], Tensor]  # on [B, N, H, D]
    causal: bool = False
    backend: SDPBackend | None = None

    def selected(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else sdpa_kernel(self.backend)


@dataclass(frozen=True)
class Samples:
    seconds: list[float]
    peak_bytes: int | None  # beyond the inputs; None on a CPU


class Bench:
    """Times every implementation; what it has seen predicts what the next length will take."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        implementations: list[Implementation],
        deadline: float,
    ) -> None:
        self.device, self.dtype, self.deadline = device, dtype, deadline
        self.implementations = implementations
        self.copy_bandwidth = self._copy_bandwidth()  # bytes read and written per second
        #: (implementation, work) -> seconds, tokens, B * H of the last length that was timed.
        self._seen: dict[tuple[str, str], tuple[float, int, int]] = {}
        #: (implementation, work) -> why it cannot run here.
        self._broken: dict[tuple[str, str], str] = {}

    def warm_up(self, num_tokens: int) -> None:
        """Call everything twice: compilation, then a first time to predict from."""
        inputs = self._inputs(num_tokens)
        for one, work in product(self.implementations, WORKS):
            call = _call(one, work, *inputs)
            try:
                with one.selected():
                    call()
                    seconds = self._time(call)
            except RuntimeError as error:
                self._broken[one.name, work] = _failure(error)
            else:
                self._seen[one.name, work] = seconds, num_tokens, self._streams(num_tokens)

    def measure(self, num_tokens: int, work: str) -> list[Row]:
        """One row per implementation."""
        expected = {one: self._predict(one, work, num_tokens) for one in self.implementations}
        outcome: dict[Implementation, Samples | str] = {}
        for one, seconds in expected.items():
            if reason := self._reason_to_skip(one, work, num_tokens, seconds):
                outcome[one] = reason
        chosen = {one: expected[one] for one in expected if one not in outcome}
        if chosen:
            outcome |= self._sample(chosen, work, num_tokens)
        return [self._row(one, work, num_tokens, outcome[one]) for one in expected]

    def _sample(
        self, expected: dict[Implementation, float], work: str, num_tokens: int
    ) -> dict[Implementation, Samples | str]:
        try:
            inputs = self._inputs(num_tokens)
        except torch.OutOfMemoryError:
            return dict.fromkeys(expected, "out of memory for the inputs")
        calls = {one: _call(one, work, *inputs) for one in expected}
        if self.device == "cpu":
            return self._sample_in_turn(calls, expected)
        return {one: self._sample_cuda(one, calls[one], expected[one]) for one in calls}

    def _sample_cuda(
        self, one: Implementation, call: Callable[[], object], expected: float
    ) -> Samples | str:
        """Replays of a graph, triton.testing.do_bench, or a few calls: by how long they are."""
        from triton.testing import do_bench, do_bench_cudagraph

        if time.monotonic() + expected > self.deadline:
            return "time budget"
        try:
            with one.selected():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                slow = expected > SLOW_SECONDS
                # Of two quick calls the first may compile.
                calls = min(3, int(POINT_SECONDS / expected)) if slow else 2
                seconds = [self._time(call) for _ in range(calls)]
                peak = torch.cuda.max_memory_allocated() - before
                if not slow:
                    short = min(seconds) < SHORT_SECONDS
                    timed = (do_bench_cudagraph if short else do_bench)(call, return_mode="all")
                    seconds = [1e-3 * ms for ms in timed]
        except torch.OutOfMemoryError:
            return "out of memory"
        except RuntimeError as error:
            return _failure(error)
        return Samples(seconds, peak)

    def _sample_in_turn(
        self,
        calls: dict[Implementation, Callable[[], object]],
        expected: dict[Implementation, float],
    ) -> dict[Implementation, Samples | str]:
        """Round robin, so that whatever else the machine does meets all of them alike."""
        seconds: dict[Implementation, list[float]] = {one: [] for one in calls}
        failures: dict[Implementation, str] = {}
        rounds = int(GROUP_SECONDS / max(sum(expected[one] for one in calls), 1e-9))
        for i_round in range(-1, min(max(rounds, 3), 100)):
            for one, call in calls.items():
                limit = SLOW_SECONDS if i_round < 0 else POINT_SECONDS / (i_round + 1)
                late = time.monotonic() + expected[one] > self.deadline
                if expected[one] > limit or late or one in failures:
                    continue
                try:
                    with one.selected():
                        elapsed = self._time(call)
                except RuntimeError as error:
                    failures[one] = _failure(error)
                    continue
                if i_round >= 0:  # round -1 warms up
                    seconds[one].append(elapsed)
        timed = {one: Samples(s, None) if s else "time budget" for one, s in seconds.items()}
        return timed | failures

    def _row(self, one: Implementation, work: str, num_tokens: int, outcome: Samples | str) -> Row:
        batch, heads = batch_and_heads(self.device, num_tokens)
        streams = batch * heads
        place: dict[str, Any] = {
            "implementation": one.name,
            "family": one.family,
            "causal": one.causal,
            "work": work,
            "num_tokens": num_tokens,
            "batch": batch,
            "num_heads": heads,
            "head_dim": HEAD_DIM,
        }
        if isinstance(outcome, str):
            return Row(**place, skipped=outcome)
        p20, median, p80 = np.quantile(outcome.seconds, (0.2, 0.5, 0.8)).tolist()
        self._seen[one.name, work] = median, num_tokens, streams
        traffic = TENSORS[work] * num_tokens * streams * HEAD_DIM * self.dtype.itemsize
        return Row(
            **place,
            median_ms=1e3 * median,
            p20_ms=1e3 * p20,
            p80_ms=1e3 * p80,
            calls=len(outcome.seconds),
            us_per_head=1e6 * median / streams,
            peak_mib=None if outcome.peak_bytes is None else outcome.peak_bytes / 2**20,
            gb_per_s=1e-9 * traffic / median,
            copy_share=traffic / median / self.copy_bandwidth,
        )

    def _predict(self, one: Implementation, work: str, num_tokens: int) -> float:
        """Seconds of a call, from the last length by the growth that the method has."""
        if (one.name, work) in self._broken:
            return 0.0
        seconds, tokens, streams = self._seen[one.name, work]
        growth = (num_tokens / tokens) ** (2 if one.family == "sdpa" else 1)
        return seconds * growth * self._streams(num_tokens) / streams

    def _reason_to_skip(
        self, one: Implementation, work: str, num_tokens: int, expected: float
    ) -> str | None:
        if (one.name, work) in self._broken:
            return self._broken[one.name, work]
        if expected > POINT_SECONDS:
            return f"one call predicted to take {expected:.0f} s, over {POINT_SECONDS:g} s"
        if time.monotonic() + expected > self.deadline:
            return "time budget"
        if self.device == "cpu":
            tensor = num_tokens * self._streams(num_tokens) * HEAD_DIM * self.dtype.itemsize
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if CPU_TENSORS * tensor > memory / 2:
                return f"memory: {CPU_TENSORS * tensor / 2**30:.0f} GiB may be needed"
        return None

    def _inputs(self, num_tokens: int) -> tuple[list[Tensor], Tensor]:
        """q, k, v as views of a packed [B, N, H, 3, D], and an output gradient [B, N, H, D]."""
        batch, heads = batch_and_heads(self.device, num_tokens)
        rows = batch, num_tokens, heads
        qkv = torch.randn(*rows, 3, HEAD_DIM, device=self.device, dtype=self.dtype)
        grad = torch.randn(*rows, HEAD_DIM, device=self.device, dtype=self.dtype)
        return [x.requires_grad_() for x in qkv.unbind(3)], grad

    def _streams(self, num_tokens: int) -> int:
        return math.prod(batch_and_heads(self.device, num_tokens))

    def _time(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _copy_bandwidth(self) -> float:
        num_bytes = COPY_BYTES[self.device]
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = [self._time(partial(target.copy_, source)) for _ in range(12)]
        return 2 * num_bytes / float(np.median(seconds[2:]))


def _call(
    one: Implementation, work: str, inputs: list[Tensor], grad: Tensor
) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return one.function(*inputs)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(one.function(*inputs), inputs, grad)

    return forward if work == "forward" else forward_and_backward


def _failure(error: Exception) -> str:
    return f"{FAILED}: {str(error).strip().partition(chr(10))[0][:100] or type(error).__name__}"

"""Measurement of runtime: attentions called in turn, within limits, every omission recorded."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from linclip_eval.runtime.fit import CallCost, RuntimePoint

__all__ = ["FAILED", "Inputs", "Limits", "Workload", "measure", "measure_in_turn", "peak_bytes"]

#: First word of the reason where a call failed.
FAILED = "failed"
#: Longest sequence of the first, unreported calls: they compile, and later calls are predicted
#: from them.
_FIRST_LOOK = 1024
#: Time that the warm-up of a point may take in addition, as a share of its runs.
_WARMUP_SHARE = 0.1
#: On a GPU, calls longer than this are timed one by one: a cleared cache makes no difference.
_LONG_CALL_SECONDS = 0.05

#: Arguments of a call, and a gradient of its output.
Inputs = tuple[tuple[Tensor, ...], Tensor]


class Workload(Protocol):
    """One computation with several attentions on the same inputs.

    Attributes:
        what: Name of the computation.
        device: Device of the calls.
        directions: Names of the directions, such as "inference" and "training".
        growth: Attention -> largest exponent of N in its time.
    """

    what: str
    device: torch.device
    directions: Sequence[str]
    growth: Mapping[str, int]

    def num_sequences(self, num_tokens: int) -> int:
        """Return the number of sequences in a call, to which its time is proportional."""

    def inputs(self, num_tokens: int) -> Inputs:
        """Return random inputs, the same for every attention and direction."""

    def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
        """Return the call that is measured."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Amount of work at one attention, direction and number of tokens.

    Attributes:
        passes: Passes over all numbers of tokens, each with a part of the runs: a slow minute of
            the machine then affects all of them, and not one alone.
        runs: Timed calls.
        warmup: Calls before them, at least one, within a tenth of ``max_seconds_per_point``.
        max_seconds_per_point: Time of the timed calls after which no more are made.
        max_seconds_per_call: Calls predicted to take longer are left out.
        graph_below_seconds: On a GPU, calls shorter than this are replayed from a CUDA graph,
            without the gaps between launches.
        quantiles: Lower and upper quantile of the runs that are reported.
    """

    passes: int = 5
    runs: int = 1000
    warmup: int = 100
    max_seconds_per_point: float = 0.5
    max_seconds_per_call: float = 20.0
    graph_below_seconds: float = 0.0
    quantiles: tuple[float, float] = (0.25, 0.75)

    def until(self, number: int) -> "Limits":
        """Return what is reached with the pass of that number, the first being 1."""
        share = number / self.passes
        return replace(
            self,
            runs=math.ceil(share * self.runs),
            warmup=math.ceil(share * self.warmup),
            max_seconds_per_point=share * self.max_seconds_per_point,
        )


def measure(
    workload: Workload, tokens: Sequence[int], limits: Limits, *, deadline: float = math.inf
) -> list[RuntimePoint]:
    """Measure time and memory of every attention and direction at every number of tokens.

    The attentions are called in turn, so that other work of the machine affects them alike.

    Args:
        tokens: Numbers of tokens, ascending.
        deadline: In seconds of ``time.monotonic``; what is predicted to end later is left out.

    Returns:
        All points, those that were left out with the reason.
    """
    bench = _Bench(workload, deadline)
    for direction in workload.directions:
        bench.visit(direction, min(tokens[0], _FIRST_LOOK), Limits(runs=1, warmup=0))
    bench.trials.clear()
    bench.skipped.clear()
    for number in range(1, limits.passes + 1):
        for num_tokens, direction in product(tokens, workload.directions):
            bench.visit(direction, num_tokens, limits.until(number))
    places = product(tokens, workload.directions, workload.growth)
    return [
        bench.point(_Place(direction, name, n), limits.quantiles) for n, direction, name in places
    ]


def measure_in_turn(
    workloads: Iterable[Workload],
    count: int,
    tokens: Sequence[int],
    limits: Limits,
    *,
    deadline: float,
) -> Iterator[list[RuntimePoint]]:
    """Measure one workload after the other; yield all points so far after each.

    Each workload gets an equal share of the time that is left, so that all get to long sequences.

    Args:
        workloads: ``count`` of them, created as they are needed.
        tokens, limits, deadline: Arguments of :func:`measure`.
    """
    points: list[RuntimePoint] = []
    for place, workload in enumerate(workloads):
        now = time.monotonic()
        share = (deadline - now) / (count - place)
        points += measure(workload, tokens, limits, deadline=now + share)
        yield points


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that torch has allocated during a call, beyond that before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.disable()  # a collection would free what earlier calls left behind
    try:
        with profile(profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    assert profiler.kineto_results is not None
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([0, *(num_bytes for _, num_bytes in changes)]).max())


class _Place(NamedTuple):
    direction: str
    attention: str
    num_tokens: int


class _Cost(NamedTuple):
    """Cost of a call for each of its sequences, which predicts that of longer sequences."""

    num_tokens: int
    seconds: float
    num_bytes: float  # of inputs and peak


@dataclass
class _Trial:
    """Peak memory of one place, and the seconds of its calls."""

    peak_bytes: int
    warmup: list[float]
    runs: list[float] = field(default_factory=list)


class _Bench:
    """Measures a workload; the cost of few tokens predicts that of more."""

    def __init__(self, workload: Workload, deadline: float) -> None:
        self.trials: dict[_Place, _Trial] = {}
        #: Why places were left out.
        self.skipped: dict[_Place, str] = {}
        self._workload, self._deadline = workload, deadline
        self._on_gpu = workload.device.type == "cuda"
        #: Direction and attention -> cost at the last number of tokens.
        self._seen: dict[tuple[str, str], _Cost] = {}
        #: Direction and attention -> reason of the failure.
        self._failed: dict[tuple[str, str], str] = {}

    def visit(self, direction: str, num_tokens: int, limits: Limits) -> None:
        """Call every attention until its runs, those of earlier visits with them, reach a limit."""
        workload, longest = self._workload, limits.max_seconds_per_point
        calls: dict[_Place, Callable[[], object]] = {}
        inputs: Inputs | None = None
        for place in (_Place(direction, name, num_tokens) for name in workload.growth):
            if not self._is_wanted(place, limits):
                continue
            try:
                inputs = inputs or workload.inputs(num_tokens)
                call = workload.call(place.attention, direction, inputs)
                if place not in self.trials:
                    self.trials[place] = self._begin(call)
                calls[place] = call
            except RuntimeError as error:  # of torch; OutOfMemoryError is one
                self._record_failure(place, error)
        warmups = [(call, self.trials[place].warmup) for place, call in calls.items()]
        self._call_in_turn(warmups, limits.warmup, _WARMUP_SHARE * longest)
        for place in list(calls) if self._on_gpu else ():
            try:
                self._add_gpu_runs(self.trials[place], calls[place], limits)
            except RuntimeError as error:
                del calls[place]
                self._record_failure(place, error)
        runs = [(call, self.trials[place].runs) for place, call in calls.items()]
        self._call_in_turn(runs, limits.runs, longest)
        for place in calls:
            assert inputs is not None
            trial, sequences = self.trials[place], workload.num_sequences(num_tokens)
            seconds = float(np.median(trial.runs))
            num_bytes = trial.peak_bytes + sum(x.nbytes for x in (*inputs[0], inputs[1]))
            cost = _Cost(num_tokens, seconds / sequences, num_bytes / sequences)
            self._seen[direction, place.attention] = cost

    def point(self, place: _Place, quantiles: tuple[float, float]) -> RuntimePoint:
        """Return the result of all visits."""
        measured = None
        if trial := self.trials.get(place):
            low, high, median = np.quantile(trial.runs, (*quantiles, 0.5)).tolist()
            count, peak = len(trial.runs), trial.peak_bytes
            measured = CallCost(seconds=median, low=low, high=high, runs=count, peak_bytes=peak)
        return RuntimePoint(
            what=self._workload.what,
            **place._asdict(),
            measured=measured,
            skipped=self.skipped.get(place, ""),
        )

    def _is_wanted(self, place: _Place, limits: Limits) -> bool:
        """Return whether to make calls there; at the first visit, record a reason not to."""
        if place in self.trials:
            runs = self.trials[place].runs
            is_due = _is_due(runs, limits.runs, limits.max_seconds_per_point)
            return is_due and self._has_time(runs[-1])
        reason = self.skipped.get(place) or self._reason_to_skip(place, limits)
        if reason is not None:
            self.skipped[place] = reason
        return reason is None

    def _reason_to_skip(self, place: _Place, limits: Limits) -> str | None:
        direction, name, num_tokens = place
        if (direction, name) in self._failed:
            return self._failed[direction, name]
        seen = self._seen.get((direction, name), _Cost(num_tokens, 0.0, 0.0))
        sequences, growth = self._workload.num_sequences(num_tokens), num_tokens / seen.num_tokens
        seconds = sequences * seen.seconds * growth ** self._workload.growth[name]
        num_bytes, memory = sequences * seen.num_bytes * growth, _memory(self._workload.device)
        if seconds > limits.max_seconds_per_call:
            most = f"{limits.max_seconds_per_call:g} s"
            return f"a call predicted to take {seconds:.1f} s, over {most}"
        if num_bytes > memory:
            most = f"{memory / 2**30:.1f} GiB"
            return f"a call predicted to fill {num_bytes / 2**30:.1f} GiB, over {most}"
        if not self._has_time(2 * seconds):  # one to warm up, one that counts
            return "no time left of the budget"
        return None

    def _has_time(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self._deadline

    def _begin(self, call: Callable[[], object]) -> _Trial:
        warmup: list[float] = []
        peak = peak_bytes(lambda: warmup.append(self._time(call)), self._workload.device)
        return _Trial(peak, warmup)

    def _call_in_turn(
        self, calls: Sequence[tuple[Callable[[], object], list[float]]], count: int, seconds: float
    ) -> None:
        """Time calls in turn, until each has ``count`` times, or took ``seconds`` in all."""
        while due := [(call, times) for call, times in calls if _is_due(times, count, seconds)]:
            for call, times in due:
                times.append(self._time(call))

    def _add_gpu_runs(self, trial: _Trial, call: Callable[[], object], limits: Limits) -> None:
        """Time calls that are not long, each with cold caches or in replays of a CUDA graph."""
        from triton.testing import do_bench, do_bench_cudagraph

        shortest, room = min(trial.warmup), limits.runs - len(trial.runs)
        left = limits.max_seconds_per_point - sum(trial.runs)
        if shortest > _LONG_CALL_SECONDS or left <= 0 or room < 2:
            return
        if shortest < limits.graph_below_seconds:
            # It makes ten replays, each of the calls that take ``rep`` milliseconds.
            milliseconds = do_bench_cudagraph(call, rep=max(1, int(100 * left)), return_mode="all")
        else:
            milliseconds = do_bench(call, warmup=5, rep=max(1, int(1e3 * left)), return_mode="all")
        trial.runs += [1e-3 * value for value in milliseconds[:room]]

    def _record_failure(self, place: _Place, error: RuntimeError) -> None:
        words = "out of memory"
        if not isinstance(error, torch.OutOfMemoryError):
            words = f"{FAILED} ({str(error).strip().partition(chr(10))[0][:100]})"
        reason = f"{words} at {place.num_tokens} tokens"
        self._failed[place.direction, place.attention] = reason
        trial = self.trials.get(place)
        if trial is None or not trial.runs:
            self.trials.pop(place, None)
            self.skipped[place] = reason

    def _time(self, call: Callable[[], object]) -> float:
        self._synchronize()
        begin = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._workload.device)


def _is_due(times: Sequence[float], count: int, seconds: float) -> bool:
    return len(times) < count and sum(times) < seconds


def _memory(device: torch.device) -> int:
    """Return the bytes that may be filled: all of a GPU, half of a machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

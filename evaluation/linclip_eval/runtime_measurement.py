"""How runtime is measured: attentions in turn, within limits, and nothing left out silently."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.autograd.profiler import profile

from linclip_eval.runtime_scaling import Measured, Point
from linclip_eval.runtime_subjects import ATTENTIONS, DIRECTIONS, Inputs, Subject

__all__ = ["Limits", "measure", "peak_bytes"]

#: Longest sequence of the first, unreported calls, which compile, and from which is predicted.
_FIRST_LOOK = 1024
#: Of the time of a point: what its warm-up may take in addition.
_WARMUP_SHARE = 0.1
#: Exponent of N in the time where it grows most.
_GROWTH = {name: 2 if attention.kind == "softmax" else 1 for name, attention in ATTENTIONS.items()}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is measured of one attention at one number of tokens.

    Attributes:
        runs: Timed calls.
        warmup: Calls before them, one in any case, within a tenth of ``max_seconds_per_point``.
        max_seconds_per_point: When the timed calls have taken so long, no more are made.
        max_seconds_per_call: What is predicted to take longer is left out.
    """

    runs: int = 1000
    warmup: int = 100
    max_seconds_per_point: float = 0.5
    max_seconds_per_call: float = 20.0

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"runs ({self.runs}) must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup ({self.warmup}) must not be negative")
        for name in ("max_seconds_per_point", "max_seconds_per_call"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")


def measure(
    subject: Subject, tokens: Sequence[int], limits: Limits, *, deadline: float = math.inf
) -> Iterator[Point]:
    """Time and memory of every attention, in inference and training, at every number of tokens.

    The attentions are called in turn, so that whatever else the machine does meets them alike.

    Args:
        subject: What is called.
        tokens: Numbers of tokens, ascending.
        limits: Of every point.
        deadline: In seconds of ``time.monotonic``; what is predicted to end later is left out.

    Yields:
        All points, those that were left out with the reason.
    """
    bench = _Bench(subject, deadline)
    for direction in DIRECTIONS:
        bench.measure(direction, min(tokens[0], _FIRST_LOOK), Limits(runs=1, warmup=0))
    for num_tokens in tokens:
        for direction in DIRECTIONS:
            yield from bench.measure(direction, num_tokens, limits)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch has allocated at any moment of a call, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.disable()  # a collection would free what earlier calls have left
    try:
        with profile(profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    assert profiler.kineto_results is not None
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([0, *(num_bytes for _, num_bytes in changes)]).max())


@dataclass(frozen=True)
class _Cost:
    """Of one call."""

    num_tokens: int
    seconds: float
    num_bytes: int  # its inputs and its peak

    def at(self, num_tokens: int, exponent: int) -> "_Cost":
        """The most it can be with more tokens."""
        growth = num_tokens / self.num_tokens
        return _Cost(num_tokens, self.seconds * growth**exponent, round(self.num_bytes * growth))


@dataclass
class _Trial:
    """A call that is being measured, and how many seconds each time took."""

    call: Callable[[], object]
    peak_bytes: int
    warmup: list[float]
    runs: list[float] = field(default_factory=list)


class _Bench:
    """Measures a subject; what it has seen predicts what more tokens will cost."""

    def __init__(self, subject: Subject, deadline: float) -> None:
        self._subject, self._deadline = subject, deadline
        self._memory = _memory(subject.device)
        #: By direction and attention.
        self._seen: dict[tuple[str, str], _Cost] = {}
        self._failed: dict[tuple[str, str], str] = {}

    def measure(self, direction: str, num_tokens: int, limits: Limits) -> list[Point]:
        """A point for every attention."""
        points: dict[str, Point] = {}
        trials: dict[str, _Trial] = {}
        inputs: Inputs | None = None
        for name in ATTENTIONS:
            reason = self._reason_to_skip(direction, name, num_tokens, limits)
            if reason is None:
                try:
                    inputs = inputs or self._subject.inputs(num_tokens)
                    trials[name] = self._begin(self._subject.call(name, direction, inputs))
                except RuntimeError as error:  # of torch; OutOfMemoryError is one
                    reason = f"{_in_words(error)} at {num_tokens} tokens"
                    self._failed[direction, name] = reason
            if reason is not None:
                points[name] = Point(
                    what=self._subject.what,
                    attention=name,
                    direction=direction,
                    num_tokens=num_tokens,
                    skipped=reason,
                )
        calls = [(trial.call, trial.warmup) for trial in trials.values()]
        self._call_in_turn(calls, limits.warmup, _WARMUP_SHARE * limits.max_seconds_per_point)
        calls = [(trial.call, trial.runs) for trial in trials.values()]
        self._call_in_turn(calls, limits.runs, limits.max_seconds_per_point)
        for name, trial in trials.items():
            assert inputs is not None
            low, median, high = np.quantile(trial.runs, (0.25, 0.5, 0.75)).tolist()
            num_bytes = _num_bytes(inputs) + trial.peak_bytes
            self._seen[direction, name] = _Cost(num_tokens, median, num_bytes)
            points[name] = Point(
                what=self._subject.what,
                attention=name,
                direction=direction,
                num_tokens=num_tokens,
                measured=Measured(
                    seconds=median,
                    low=low,
                    high=high,
                    runs=len(trial.runs),
                    peak_bytes=trial.peak_bytes,
                ),
            )
        return [points[name] for name in ATTENTIONS]

    def _reason_to_skip(
        self, direction: str, name: str, num_tokens: int, limits: Limits
    ) -> str | None:
        if (direction, name) in self._failed:
            return self._failed[direction, name]
        seen = self._seen.get((direction, name), _Cost(num_tokens, seconds=0.0, num_bytes=0))
        cost = seen.at(num_tokens, _GROWTH[name])
        if cost.seconds > limits.max_seconds_per_call:
            most = f"{limits.max_seconds_per_call:g} s"
            return f"a call predicted to take {cost.seconds:.1f} s, over {most}"
        if cost.num_bytes > self._memory:
            most = f"{self._memory / 2**30:.1f} GiB"
            return f"a call predicted to fill {cost.num_bytes / 2**30:.1f} GiB, over {most}"
        if time.monotonic() + 2 * cost.seconds > self._deadline:  # one to warm up, one that counts
            return "no time left of the budget"
        return None

    def _begin(self, call: Callable[[], object]) -> _Trial:
        warmup: list[float] = []
        peak = peak_bytes(lambda: warmup.append(self._time(call)), self._subject.device)
        return _Trial(call, peak, warmup)

    def _call_in_turn(
        self, calls: Sequence[tuple[Callable[[], object], list[float]]], count: int, seconds: float
    ) -> None:
        """Add the times of calls, until of each there are ``count``, or ``seconds`` in all."""
        while due := [
            (call, times) for call, times in calls if len(times) < count and sum(times) < seconds
        ]:
            for call, times in due:
                times.append(self._time(call))

    def _time(self, call: Callable[[], object]) -> float:
        self._synchronize()
        begin = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._subject.device.type == "cuda":
            torch.cuda.synchronize(self._subject.device)


def _memory(device: torch.device) -> int:
    """Bytes that may be filled: all of a GPU, half of a machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _num_bytes(inputs: Inputs) -> int:
    tensors, grad = inputs
    return sum(x.numel() * x.element_size() for x in (*tensors, grad))


def _in_words(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed ({str(error).strip().partition(chr(10))[0][:100]})"

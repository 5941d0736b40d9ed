"""How runtime is measured: attentions in turn, within limits, and nothing left out silently."""

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.profiler import profile

from linclip_eval.runtime.fit import Measured, Point
from linclip_eval.runtime.subjects import ATTENTIONS, DIRECTIONS, Inputs, Subject

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
        passes: How often all numbers of tokens are gone through, each time for a part of the runs:
            a slow minute of the machine then meets all of them, and not one alone.
        runs: Timed calls.
        warmup: Calls before them, one in any case, within a tenth of ``max_seconds_per_point``.
        max_seconds_per_point: When the timed calls have taken so long, no more are made.
        max_seconds_per_call: What is predicted to take longer is left out.
    """

    passes: int = 5
    runs: int = 1000
    warmup: int = 100
    max_seconds_per_point: float = 0.5
    max_seconds_per_call: float = 20.0

    def __post_init__(self) -> None:
        for name in ("passes", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup ({self.warmup}) must not be negative")
        for name in ("max_seconds_per_point", "max_seconds_per_call"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")

    def until(self, number: int) -> "Limits":
        """What is reached with the pass of that number, the first being 1."""
        share = number / self.passes
        return replace(
            self,
            runs=math.ceil(share * self.runs),
            warmup=math.ceil(share * self.warmup),
            max_seconds_per_point=share * self.max_seconds_per_point,
        )


def measure(
    subject: Subject, tokens: Sequence[int], limits: Limits, *, deadline: float = math.inf
) -> list[Point]:
    """Time and memory of every attention, in inference and training, at every number of tokens.

    The attentions are called in turn, so that whatever else the machine does meets them alike.

    Args:
        subject: What is called.
        tokens: Numbers of tokens, ascending.
        limits: Of every point.
        deadline: In seconds of ``time.monotonic``; what is predicted to end later is left out.

    Returns:
        All points, those that were left out with the reason.
    """
    bench = _Bench(subject, deadline)
    for direction in DIRECTIONS:
        bench.visit(direction, min(tokens[0], _FIRST_LOOK), Limits(runs=1, warmup=0))
    bench.trials.clear()
    bench.skipped.clear()
    for number in range(1, limits.passes + 1):
        for num_tokens, direction in product(tokens, DIRECTIONS):
            bench.visit(direction, num_tokens, limits.until(number))
    places = product(tokens, DIRECTIONS, ATTENTIONS)
    return [bench.point(_Place(direction, name, n)) for n, direction, name in places]


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


class _Place(NamedTuple):
    direction: str
    attention: str
    num_tokens: int


@dataclass
class _Trial:
    """What was seen of one place: how many seconds each call took."""

    peak_bytes: int
    warmup: list[float]
    runs: list[float] = field(default_factory=list)


class _Bench:
    """Measures a subject; what it has seen predicts what more tokens will cost.

    Attributes:
        trials: What was measured.
        skipped: Why the rest was not.
    """

    def __init__(self, subject: Subject, deadline: float) -> None:
        self.trials: dict[_Place, _Trial] = {}
        self.skipped: dict[_Place, str] = {}
        self._subject, self._deadline = subject, deadline
        self._memory = _memory(subject.device)
        #: By direction and attention.
        self._seen: dict[tuple[str, str], _Cost] = {}
        self._failed: dict[tuple[str, str], str] = {}

    def visit(self, direction: str, num_tokens: int, limits: Limits) -> None:
        """Call every attention until its runs, those of earlier visits with them, reach a limit."""
        calls: dict[_Place, Callable[[], object]] = {}
        inputs: Inputs | None = None
        for place in (_Place(direction, name, num_tokens) for name in ATTENTIONS):
            if not self._is_wanted(place, limits):
                continue
            try:
                inputs = inputs or self._subject.inputs(num_tokens)
                calls[place] = self._subject.call(place.attention, direction, inputs)
                if place not in self.trials:
                    self.trials[place] = self._begin(calls[place])
            except RuntimeError as error:  # of torch; OutOfMemoryError is one
                calls.pop(place, None)
                reason = f"{_in_words(error)} at {num_tokens} tokens"
                self._failed[direction, place.attention] = reason
                if place not in self.trials:
                    self.skipped[place] = reason
        longest = limits.max_seconds_per_point
        warmups = [(call, self.trials[place].warmup) for place, call in calls.items()]
        self._call_in_turn(warmups, limits.warmup, _WARMUP_SHARE * longest)
        runs = [(call, self.trials[place].runs) for place, call in calls.items()]
        self._call_in_turn(runs, limits.runs, longest)
        for place in calls:
            assert inputs is not None
            trial = self.trials[place]
            seconds = float(np.median(trial.runs))
            num_bytes = _num_bytes(inputs) + trial.peak_bytes
            self._seen[direction, place.attention] = _Cost(num_tokens, seconds, num_bytes)

    def point(self, place: _Place) -> Point:
        """What all visits have found."""
        trial = self.trials.get(place)
        measured = None
        if trial is not None:
            low, median, high = np.quantile(trial.runs, (0.25, 0.5, 0.75)).tolist()
            measured = Measured(
                seconds=median,
                low=low,
                high=high,
                runs=len(trial.runs),
                peak_bytes=trial.peak_bytes,
            )
        return Point(
            what=self._subject.what,
            attention=place.attention,
            direction=place.direction,
            num_tokens=place.num_tokens,
            measured=measured,
            skipped=self.skipped.get(place, ""),
        )

    def _is_wanted(self, place: _Place, limits: Limits) -> bool:
        """Whether to make calls there; at first, what speaks against it is noted."""
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
        seen = self._seen.get((direction, name), _Cost(num_tokens, seconds=0.0, num_bytes=0))
        cost = seen.at(num_tokens, _GROWTH[name])
        if cost.seconds > limits.max_seconds_per_call:
            most = f"{limits.max_seconds_per_call:g} s"
            return f"a call predicted to take {cost.seconds:.1f} s, over {most}"
        if cost.num_bytes > self._memory:
            most = f"{self._memory / 2**30:.1f} GiB"
            return f"a call predicted to fill {cost.num_bytes / 2**30:.1f} GiB, over {most}"
        if not self._has_time(2 * cost.seconds):  # one to warm up, one that counts
            return "no time left of the budget"
        return None

    def _has_time(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self._deadline

    def _begin(self, call: Callable[[], object]) -> _Trial:
        warmup: list[float] = []
        peak = peak_bytes(lambda: warmup.append(self._time(call)), self._subject.device)
        return _Trial(peak, warmup)

    def _call_in_turn(
        self, calls: Sequence[tuple[Callable[[], object], list[float]]], count: int, seconds: float
    ) -> None:
        """Add the times of calls, until of each there are ``count``, or ``seconds`` in all."""
        while due := [(call, times) for call, times in calls if _is_due(times, count, seconds)]:
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


def _is_due(times: Sequence[float], count: int, seconds: float) -> bool:
    return len(times) < count and sum(times) < seconds


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

"""Comparison between hosts of what all ranks returned in one check, in words."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ds_linclip.process.number_text import format_figure

__all__ = [
    "RankResults",
    "differences",
    "format_gib",
    "format_range",
    "grouped",
    "keys_by_value",
    "plural",
    "seconds_of",
]

K = TypeVar("K")
T = TypeVar("T")

_NUM_NAMED_HOSTS = 16  # in one list; the others are counted


@dataclass(frozen=True)
class RankResults:
    """The result of a check on every rank that made it.

    Attributes:
        hosts: The host of every rank.
        values: The results of the check, by rank.
        errors: Why it returned nothing, by rank.
    """

    hosts: Sequence[str]
    values: Mapping[int, Any]
    errors: Mapping[int, str]

    def failures(self) -> list[tuple[str, str]]:
        """Return pairs of the hosts that have an error and the error."""
        return [
            (_names(list(dict.fromkeys(self.hosts[rank] for rank in ranks))), error)
            for error, ranks in keys_by_value(self.errors).items()
        ]

    def by_host(self, combine: Callable[[list[Any]], T]) -> dict[str, T]:
        """Return the values by host, those of its ranks combined into one."""
        ranks = keys_by_value({rank: self.hosts[rank] for rank in self.values})
        return {host: combine([self.values[r] for r in its]) for host, its in ranks.items()}


def differences(by_host: Mapping[str, str], what: str) -> list[tuple[str, str]]:
    """Return pairs of a host whose value is not that of most hosts, and what differs."""
    values = list(by_host.values())
    usual = max(values, key=values.count, default="")
    others = _names([host for host, value in by_host.items() if value == usual])
    return [
        (host, f"{what} {value}, where {others} has {usual}")
        for host, value in by_host.items()
        if value != usual
    ]


def grouped(by_host: Mapping[str, str]) -> str:
    """Return the value that all hosts share, else every value with the hosts that have it."""
    hosts = keys_by_value(by_host)
    if len(hosts) == 1:
        return next(iter(hosts))
    return "; ".join(f"{value} ({_names(names)})" for value, names in hosts.items())


def keys_by_value(values: Mapping[K, T]) -> dict[T, list[K]]:
    """Return the keys of every value, both in their order."""
    keys: dict[T, list[K]] = {}
    for key, value in values.items():
        keys.setdefault(value, []).append(key)
    return keys


def format_range(by_host: Mapping[str, float], scale: float = 1.0) -> str:
    """Return the least and the greatest of the values times ``scale``, with their hosts."""
    low, high = min(by_host, key=by_host.__getitem__), max(by_host, key=by_host.__getitem__)
    least, most = format_figure(scale * by_host[low]), format_figure(scale * by_host[high])
    return least if least == most else f"{least} ({low}) to {most} ({high})"


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def format_gib(num_bytes: float) -> str:
    return f"{format_figure(num_bytes / 2**30)} GiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _names(hosts: Sequence[str]) -> str:
    more = len(hosts) - _NUM_NAMED_HOSTS
    return ", ".join(hosts[:_NUM_NAMED_HOSTS]) + (f" and {more} more" if more > 0 else "")

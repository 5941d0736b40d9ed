"""The report of an inspection: findings of shards, added up and summarised."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ds_linclip.data.causes import explain
from ds_linclip.data.tally import Tally
from ds_linclip.process.number_text import format_figure

__all__ = ["CONTEXT_LENGTH", "ShardFindings", "summarise", "to_text"]

CONTEXT_LENGTH = 77

_MAX_PROBLEMS_LISTED = 1000
_NUM_BINS = 32
_LENGTHS = ("caption_characters", "caption_tokens", "image_width", "image_height", "image_bytes")


@dataclass
class ShardFindings:
    """The findings of one shard, or the sum of those of several."""

    expected: int = 0  # samples by the stated sizes of the shards
    unsized: int = 0  # shards without a stated size, which are taken to be complete
    found: int = 0  # samples in the tars
    read: int = 0  # samples
    bytes_read: int = 0
    seconds: float = 0.0  # of reading and decoding, summed over workers
    bad_samples: Tally = field(default_factory=Tally)
    passed_over: Tally = field(default_factory=Tally)  # members that are never read
    captions: Tally = field(default_factory=Tally)  # drawn, but not usable: another one was taken
    shards_by_cause: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, str | int]] = field(default_factory=list)  # of single shards
    # Usable samples by length of the caption, (width, height) in pixels, size of the file, and
    # Pillow's format and mode.
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    image_bytes: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    @property
    def is_whole(self) -> bool:
        """Whether every expected sample was found, and none beyond them."""
        return all(problem["cause"] == "keys_repeated" for problem in self.problems)

    def add(self, other: "ShardFindings") -> None:
        """Add the findings of other shards to these."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Tally):
                mine.merge(theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, item.name, mine + theirs)


def summarise(total: ShardFindings, *, seconds: float, num_workers: int) -> dict[str, Any]:
    """Return counts, distributions and throughput of all shards, ready for JSON.

    Args:
        total: The findings of all shards.
        seconds: The duration of the inspection.
        num_workers: The number of processes.
    """
    usable = total.characters.total()
    widths, heights = Counter[int](), Counter[int]()
    for (width, height), count in total.sizes.items():
        widths[width] += count
        heights[height] += count
    sides = _log_edges([*widths, *heights])
    truncated = sum(n for length, n in total.tokens.items() if length > CONTEXT_LENGTH)
    busy, megabytes = max(total.seconds, 1e-9), total.bytes_read / 1e6
    return {
        "samples": {
            "expected": total.expected,
            "found": total.found,
            "read": total.read,
            "usable": usable,
        },
        "causes": _entries(total.bad_samples, "samples", total.shards_by_cause),
        "passed_over": _entries(total.passed_over, "members", total.shards_by_cause),
        "captions_passed_over": _entries(total.captions, "captions", total.shards_by_cause),
        "problems": total.problems[:_MAX_PROBLEMS_LISTED],
        "problems_not_listed": len(total.problems[_MAX_PROBLEMS_LISTED:]),
        "caption_characters": _distribution(total.characters, _log_edges(total.characters)),
        "caption_tokens": {
            **_distribution(total.tokens, _even_edges(total.tokens)),
            "context_length": CONTEXT_LENGTH,
            "truncated": truncated,
            "truncated_share": truncated / max(1, usable),
        },
        "image_width": _distribution(widths, sides),
        "image_height": _distribution(heights, sides),
        "image_bytes": _distribution(total.image_bytes, _log_edges(total.image_bytes)),
        "image_sizes": [[*size, n] for size, n in _most_common(total.sizes)[:20]],
        "formats": dict(_most_common(total.formats)),
        "modes": dict(_most_common(total.modes)),
        "throughput": {
            "workers": num_workers,
            "seconds": seconds,
            "samples_per_second": total.read / seconds,
            "mb_per_second": megabytes / seconds,
            "samples_per_second_per_worker": total.read / busy,
            "mb_per_second_per_worker": megabytes / busy,
        },
    }


def _entries(
    tally: Tally, counted: str, shards: Mapping[str, int]
) -> dict[str, dict[str, int | str]]:
    return {
        cause: {counted: count, "shards": shards[cause], "first": tally.examples[cause]}
        for cause, count in sorted(tally.items())
    }


def _most_common(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    """Sort by count; equal counts by name, so that reports can be compared."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _log_edges(values: Collection[int]) -> np.ndarray:
    low, high = min(values, default=1), max(values, default=1)
    # A single value still gets a visible bar.
    return np.geomspace(max(0.5, 0.8 * low), 1.25 * high, _NUM_BINS + 1)


def _even_edges(values: Collection[int]) -> np.ndarray:
    low, high = min(values, default=1), max(values, default=1)
    step = -(-(high - low + 1) // _NUM_BINS)
    return np.arange(low, high + step + 1, step) - 0.5


def _distribution(counts: Mapping[int, int], edges: np.ndarray) -> dict[str, Any]:
    if not counts:
        return {"count": 0, "edges": [], "counts": []}
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    below = weights.cumsum()
    quantiles = {
        name: int(values[np.searchsorted(below, share * below[-1])])
        for name, share in (("p5", 0.05), ("median", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    return {
        "count": int(below[-1]),
        "mean": float((values * weights).sum() / below[-1]),
        "min": int(values[0]),
        **quantiles,
        "max": int(values[-1]),
        "edges": [round(float(edge), 2) for edge in edges],
        "counts": np.histogram(values, edges, weights=weights)[0].astype(int).tolist(),
    }


def _table(causes: Mapping[str, Mapping[str, Any]], counted: str) -> list[str]:
    """Return a line for each cause, and the meanings of those that need one."""
    rows = [
        f"{cause:24} {counts[counted]:10} {counts['shards']:8}  {counts['first']}"
        for cause, counts in causes.items()
    ]
    meanings = [explain(cause) for cause in causes if explain(cause) != cause]
    title = {"samples": "cause", "members": "passed over"}.get(counted, "another one taken")
    return [f"{title:24} {counted:>10} {'shards':>8}  first", *(rows or ["none"]), *meanings]


def to_text(report: Mapping[str, Any]) -> str:
    """Return the report as a table for a terminal."""
    shards, samples, speed = report["shards"], report["samples"], report["throughput"]
    lines = [
        f"{shards['inspected']} of {shards['listed']} shards: {samples['expected']} samples "
        f"expected, {samples['found']} found, {samples['read']} read, {samples['usable']} usable",
        *_table(report["causes"], "samples"),
    ]
    for name, counted in (("passed_over", "members"), ("captions_passed_over", "captions")):
        lines += _table(report[name], counted) if report[name] else []
    if shards["unsized"]:
        lines.append(
            f"{shards['unsized']} shards have neither sizes.json nor _stats.json and may be "
            "incomplete"
        )
    lines.append(f"{'usable samples':18} {'p5':>9} {'median':>9} {'p95':>9} {'max':>9}")
    for name in _LENGTHS:
        numbers = [report[name].get(key, 0) for key in ("p5", "median", "p95", "max")]
        lines.append(f"{name:18} " + " ".join(f"{number:9}" for number in numbers))
    for name in ("formats", "modes"):
        lines.append(f"{name}: {', '.join(f'{key} {n}' for key, n in report[name].items())}")
    share = report["caption_tokens"]["truncated_share"]
    lines += [
        f"captions over {CONTEXT_LENGTH} tokens: {share:.2%}"
        if samples["usable"]
        else "no usable sample",
        f"{format_figure(speed['samples_per_second'])} samples/s, "
        f"{format_figure(speed['mb_per_second'])} MB/s with "
        f"{speed['workers']} workers; a worker alone "
        f"{format_figure(speed['samples_per_second_per_worker'])} samples/s, "
        f"{format_figure(speed['mb_per_second_per_worker'])} MB/s",
    ]
    lines += [
        f"{path}: {counts['written']} of {counts['shards']} shards written"
        for path, counts in report["sizes_files"].items()
    ]
    return "\n".join(lines)

"""Subcommand ``ds-linclip inspect-shards``: what shards hold, and what of it training cannot use.

Samples are read and judged as in training; causes have the names under which a run counts them.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_linclip.config import CacheConfig, NetworkConfig, Source
from ds_linclip.data.decode import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    CaptionTokenizer,
    decode_image,
    decode_text,
    open_image,
)
from ds_linclip.data.inspection_figure import draw_inspection
from ds_linclip.data.inspection_report import CONTEXT_LENGTH, Findings, summarise, to_text
from ds_linclip.data.process_pool import num_usable_cores, ordered_map
from ds_linclip.data.shards import Shard, find_shards
from ds_linclip.data.storage import Storage
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["inspect_shards", "main"]


def inspect_shards(
    patterns: Sequence[str],
    *,
    max_shards: int | None = None,
    max_samples: int | None = None,
    num_workers: int = 1,
    decode: bool = True,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Read shards and report what they hold.

    Args:
        patterns: As in ``data.train``.
        max_shards: Shards to look at, evenly spaced; None: all.
        max_samples: Samples to read at most, evenly spaced over the shards and in each; None: all.
        num_workers: Processes; but for ``throughput``, the report does not depend on it.
        decode: Decode the images; without, a damage behind the header goes unnoticed.
        cache_dir: Folder for copies of remote shards.

    Returns:
        Numbers, texts, lists and dictionaries, ready for JSON.

    Raises:
        ValueError: for a number below 1 or a pattern that :func:`find_shards` refuses.
        OSError: when a shard cannot be reached.
    """
    limits = {"max_shards": max_shards, "max_samples": max_samples, "workers": num_workers}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    inspect = _Inspector(decode, cache_dir)
    groups = find_shards([Source(shards=pattern) for pattern in patterns], inspect.storage())
    listed = [shard for group in groups for shard in group.shards]
    shards = [listed[i] for i in _spread(len(listed), max_shards)]
    quotas: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        ends = [max_samples * i // len(shards) for i in range(len(shards) + 1)]
        quotas = [end - start for start, end in pairwise(ends)]
    total = Findings()
    start = time.perf_counter()
    found = ordered_map(inspect, zip(shards, quotas, strict=True), num_workers=num_workers)
    with closing(found), tqdm(found, total=len(shards), unit="shard") as progress:
        for findings in progress:
            total.add(findings)
    seconds = time.perf_counter() - start
    return {
        "patterns": list(patterns),
        "decode": decode,
        "shards": {"listed": len(listed), "inspected": len(shards)},
        **summarise(total, seconds=seconds, num_workers=num_workers),
    }


@dataclass(frozen=True)
class _Inspector:
    """Goes to worker processes and looks at one shard at a time."""

    decode: bool
    cache_dir: str | None

    def storage(self) -> Storage:
        return _storage(self.cache_dir)

    def __call__(self, task: tuple[Shard, int | None]) -> Findings:
        shard, quota = task
        findings = Findings(expected=shard.num_samples)
        try:
            opened = OpenShard(self.storage().open(shard.url), shard.url)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            _note(findings, shard, "shard_missing", shard.num_samples)
            return findings
        except BadSample as error:
            _note(findings, shard, error.cause, shard.num_samples)
            return findings
        with closing(opened):
            findings.found = len(opened)
            lost = shard.num_samples - len(opened)
            if lost > 0 or opened.cut:
                _note(findings, shard, "shard_cut" if opened.cut else "shard_short", max(0, lost))
            elif lost < 0:
                _note(findings, shard, "shard_long", -lost)
            if opened.repeated_keys:
                _note(findings, shard, "keys_repeated", opened.repeated_keys)
            # Training reads no samples beyond the expected ones.
            indices = _spread(min(len(opened), shard.num_samples), quota)
            self._read(opened, indices, findings)
        return findings

    def _read(self, opened: OpenShard, indices: Sequence[int], findings: Findings) -> None:
        bad: Counter[str] = Counter()
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is counted here
            for index in indices:
                try:
                    self._read_sample(opened, index, findings)
                except BadSample as error:
                    bad[error.cause] += 1
        findings.seconds = time.perf_counter() - start
        findings.read = len(indices)
        findings.samples_by_cause.update(bad)
        findings.shards_by_cause.update(bad.keys())

    def _read_sample(self, opened: OpenShard, index: int, findings: Findings) -> None:
        """Text first, then the image, as training does: the first cause counts."""
        text = opened.read(index, "text", max_bytes=MAX_TEXT_BYTES)
        findings.bytes_read += len(text)
        caption = decode_text(text)
        content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
        findings.bytes_read += len(content)
        with open_image(content) as image:
            size, kind, mode = image.size, image.format or "", image.mode
        if self.decode:
            decode_image(content)
        findings.characters[len(caption)] += 1
        findings.tokens[_tokenizer().count(caption)] += 1
        findings.sizes[size] += 1
        findings.image_bytes[len(content)] += 1
        findings.formats[kind] += 1
        findings.modes[mode] += 1


def _note(findings: Findings, shard: Shard, cause: str, num_samples: int) -> None:
    findings.samples_by_cause[cause] += num_samples
    findings.shards_by_cause[cause] += 1
    findings.problems.append(
        {
            "url": shard.url,
            "cause": cause,
            "samples": num_samples,
            "expected": shard.num_samples,
            "found": findings.found,
        }
    )


def _spread(length: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices, evenly spaced."""
    count = length if limit is None else min(length, limit)
    return [i * length // count for i in range(count)]


@cache
def _storage(cache_dir: str | None) -> Storage:
    return Storage(CacheConfig(dir=cache_dir), NetworkConfig())


@cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(CONTEXT_LENGTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 0 for dirty shards too."""
    options = _parser().parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        report = inspect_shards(
            options.patterns,
            max_shards=options.max_shards,
            max_samples=options.max_samples,
            num_workers=options.workers,
            decode=options.decode,
            cache_dir=options.cache_dir,
        )
        (options.out / "report.json").write_text(json.dumps(report, indent=4) + "\n")
        draw_inspection(report).savefig(options.out / "report.png")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{to_text(report)}\nreport: {options.out}/report.json, report.png\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-linclip inspect-shards",
        description="Report what shards hold and what of it training cannot use.",
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="as in data.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--max-shards", type=int, metavar="N", help="look at N shards, evenly spaced"
    )
    parser.add_argument(
        "--max-samples", type=int, metavar="N", help="read at most N samples, evenly spaced"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=num_usable_cores(),
        metavar="N",
        help="processes; default: one per core",
    )
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode the images instead of reading their headers only; default: yes",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="copies of remote shards go there")
    return parser

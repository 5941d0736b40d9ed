"""Subcommand ``ds-linclip inspect-shards``: what shards hold, and what of it training cannot use.

Samples are read and judged as in training; causes have the names under which a run counts them.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_linclip.config import CacheConfig, NetworkConfig, Source
from ds_linclip.data.prepare.inspection_figure import draw_inspection
from ds_linclip.data.prepare.inspection_report import CONTEXT_LENGTH, Findings, summarise, to_text
from ds_linclip.data.prepare.parallel_map import num_usable_cores, ordered_map
from ds_linclip.data.remote import Storage, is_remote, redact
from ds_linclip.data.sample_reader import ShardProblem, open_and_judge
from ds_linclip.data.shard_index import Shard, find_shards
from ds_linclip.data.tar_index import BadSample, OpenShard
from ds_linclip.data.transforms import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    CaptionTokenizer,
    decode_image,
    decode_text,
    open_image,
)

__all__ = ["inspect_shards", "main"]


def inspect_shards(
    patterns: Sequence[str],
    *,
    max_shards: int | None = None,
    max_samples: int | None = None,
    num_workers: int = 1,
    decode: bool = True,
    cache_dir: str | None = None,
    write_sizes: bool = False,
) -> dict[str, Any]:
    """Read shards and report what they hold.

    Sizes need not be known: a shard that nothing vouches for is expected to hold what it holds.

    Args:
        patterns: As in ``data.train``.
        max_shards: Shards to look at, evenly spaced; None: all.
        max_samples: Samples to read at most, evenly spaced over the shards and in each; None: all.
        num_workers: Processes; but for ``throughput``, the report does not depend on it.
        decode: Decode the images; without, a damage behind the header goes unnoticed.
        cache_dir: Folder for copies of remote shards.
        write_sizes: Write ``sizes.json`` beside the shards, with the samples found in each one that
            was read whole and is not at odds with what vouches for it. Entries of other shards
            stay. Needs local shards and no ``max_shards`` or ``max_samples``.

    Returns:
        Numbers, texts, lists and dictionaries, ready for JSON.

    Raises:
        ValueError: for a number below 1, a pattern that :func:`find_shards` refuses, or what
            ``write_sizes`` does not go with.
        OSError: when a shard cannot be reached, or ``sizes.json`` not be written.
    """
    limits = {"max_shards": max_shards, "max_samples": max_samples, "workers": num_workers}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
        if write_sizes and value is not None and name != "workers":
            raise ValueError(f"{name} ({value}) must be left out with write_sizes")
    sizes = _SizesFiles(patterns) if write_sizes else None
    inspect = _Inspector(decode, cache_dir)
    sources = [Source(shards=pattern) for pattern in patterns]
    groups = find_shards(sources, inspect.storage(), count_headers=False)
    listed = [shard for group in groups for shard in group.shards]
    if sizes is not None:
        sizes.expect(listed)
    shards = [listed[i] for i in _spread(len(listed), max_shards)]
    quotas: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        ends = [max_samples * i // len(shards) for i in range(len(shards) + 1)]
        quotas = [end - start for start, end in pairwise(ends)]
    total = Findings()
    start = time.perf_counter()
    found = ordered_map(inspect, zip(shards, quotas, strict=True), num_workers=num_workers)
    with closing(found), tqdm(found, total=len(shards), unit="shard") as progress:
        for shard, findings in zip(shards, progress, strict=True):
            total.add(findings)
            if sizes is not None:
                sizes.add(shard, findings)
    seconds = time.perf_counter() - start
    return {
        "patterns": list(patterns),
        "decode": decode,
        "shards": {
            "listed": len(listed),
            "inspected": len(shards),
            "unvouched": total.unvouched,
        },
        "sizes_files": {} if sizes is None else sizes.write(),
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
        opened, problems = open_and_judge(shard, self.storage())
        # Training reads no samples beyond the expected ones.
        expected = (
            shard.num_samples if shard.exact or isinstance(opened, BadSample) else len(opened)
        )
        findings = Findings(expected=expected, unvouched=int(not shard.exact))
        for problem in problems:
            _note(findings, problem)
        if isinstance(opened, OpenShard):
            with closing(opened):
                findings.found = len(opened)
                self._read(opened, _spread(min(len(opened), expected), quota), findings)
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


def _note(findings: Findings, problem: ShardProblem) -> None:
    too_many = problem.found - problem.expected
    is_more = problem.cause in ("shard_long", "keys_repeated")
    num_samples = too_many if is_more else max(0, -too_many)
    findings.samples_by_cause[problem.cause] += num_samples
    findings.shards_by_cause[problem.cause] += 1
    findings.problems.append(
        {
            "url": problem.url,
            "cause": problem.cause,
            "samples": num_samples,
            "expected": problem.expected,
            "found": problem.found,
        }
    )


def _spread(length: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices, evenly spaced."""
    count = length if limit is None else min(length, limit)
    return [i * length // count for i in range(count)]


class _SizesFiles:
    """``sizes.json`` in every folder of local shards."""

    def __init__(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            _local_path(pattern)
        self._num_shards: Counter[Path] = Counter()
        self._found: dict[Path, dict[str, int]] = {}

    def expect(self, shards: Iterable[Shard]) -> None:
        self._num_shards.update(_local_path(shard.url).parent for shard in shards)
        for folder in self._num_shards:
            self._found[folder] = {}
            if not os.access(folder, os.W_OK):  # at the end, it would be known hours later
                raise PermissionError(f"write_sizes must be able to write into {folder}")

    def add(self, shard: Shard, findings: Findings) -> None:
        if findings.is_whole:
            path = _local_path(shard.url)
            self._found[path.parent][path.name] = findings.found

    def write(self) -> dict[str, dict[str, int]]:
        """Update the files; returns by path how many shards there are, and were written."""
        for folder, found in self._found.items():
            path = folder / "sizes.json"
            sizes = json.loads(path.read_text()) if path.exists() else {}
            partial = folder / f".sizes.json.{os.getpid()}"
            try:
                partial.write_text(json.dumps(sizes | found, indent=4, sort_keys=True) + "\n")
                os.replace(partial, path)  # readers find the old file or the new one
            finally:
                partial.unlink(missing_ok=True)
        return {
            f"{folder}/sizes.json": {"shards": self._num_shards[folder], "written": len(found)}
            for folder, found in self._found.items()
        }


def _local_path(url: str) -> Path:
    if is_remote(url):
        raise ValueError(f"write_sizes needs local shards; {redact(url)} is remote")
    scheme, mark, path = url.partition("://")
    return Path(path if mark and scheme.lower() in ("file", "local") else url)


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
            write_sizes=options.write_sizes,
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
    parser.add_argument(
        "--write-sizes",
        action="store_true",
        help="write the number of samples of local shards into sizes.json beside them",
    )
    return parser

"""Subcommand ``ds-linclip inspect-shards``: report the content of shards and its defects.

Samples are read and checked as in training; defects have the names under which a run counts them.
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
from dataclasses import asdict
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_linclip.config import CacheConfig, NetworkConfig, Source
from ds_linclip.data.prepare.inspection_figure import draw_inspection
from ds_linclip.data.prepare.inspection_report import (
    CONTEXT_LENGTH,
    ShardFindings,
    summarise,
    to_text,
)
from ds_linclip.data.prepare.parallel_map import num_usable_cores, ordered_map
from ds_linclip.data.remote import Storage, is_remote, redact
from ds_linclip.data.sample_reader import ShardProblem, open_shard
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
from ds_linclip.process.atomic import write_atomically

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

    The number of samples need not be known: without it, a shard is taken to be complete.

    Args:
        patterns: Shards, as in ``data.train``.
        max_shards: The number of shards to inspect, evenly spaced; None: all.
        max_samples: The number of samples to read, evenly spaced; None: all.
        num_workers: Processes; the report does not depend on it, except for ``throughput``.
        decode: Whether to decode images; otherwise only their headers are checked.
        cache_dir: The folder for copies of remote shards.
        write_sizes: Whether to write ``sizes.json`` beside the shards, with the number of samples
            of each shard that is complete and agrees with its stated size. Entries of other shards
            are kept. It needs local shards and neither ``max_shards`` nor ``max_samples``.

    Returns:
        The report, ready for JSON.

    Raises:
        ValueError: for a number below 1, a pattern that :func:`find_shards` refuses, or arguments
            that ``write_sizes`` does not allow.
        OSError: when a shard cannot be reached or ``sizes.json`` cannot be written.
    """
    limits = {"max_shards": max_shards, "max_samples": max_samples, "workers": num_workers}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
        if write_sizes and value is not None and name != "workers":
            raise ValueError(f"{name} ({value}) must be left out with write_sizes")
    if write_sizes:
        for pattern in patterns:
            _local_path(pattern)
    sources = [Source(shards=pattern) for pattern in patterns]
    groups = find_shards(sources, _storage(cache_dir), count_headers=False)
    listed = [shard for group in groups for shard in group.shards]
    sizes = _SizesFiles(listed if write_sizes else [])
    shards = [listed[i] for i in _spread(len(listed), max_shards)]
    quotas: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        ends = [max_samples * i // len(shards) for i in range(len(shards) + 1)]
        quotas = [end - start for start, end in pairwise(ends)]
    total = ShardFindings()
    start = time.perf_counter()
    inspect = partial(_inspect, decode=decode, cache_dir=cache_dir)
    found = ordered_map(inspect, zip(shards, quotas, strict=True), num_workers=num_workers)
    with closing(found), tqdm(found, total=len(shards), unit="shard") as progress:
        for shard, findings in zip(shards, progress, strict=True):
            total.add(findings)
            if write_sizes and findings.is_whole:
                sizes.add(shard, findings.found)
    seconds = time.perf_counter() - start
    return {
        "patterns": list(patterns),
        "decode": decode,
        "shards": {
            "listed": len(listed),
            "inspected": len(shards),
            "unsized": total.unsized,
        },
        "sizes_files": sizes.write(),
        **summarise(total, seconds=seconds, num_workers=num_workers),
    }


def _inspect(
    task: tuple[Shard, int | None], *, decode: bool, cache_dir: str | None
) -> ShardFindings:
    """Inspect a shard: all its samples, or as many as given, evenly spaced."""
    shard, limit = task
    opened, problems = open_shard(shard, _storage(cache_dir))
    # Training reads no samples beyond the expected number.
    expected = shard.num_samples if shard.exact or isinstance(opened, BadSample) else len(opened)
    findings = ShardFindings(expected=expected, unsized=int(not shard.exact))
    for problem in problems:
        _note(findings, problem)
    if isinstance(opened, OpenShard):
        with closing(opened):
            findings.found = len(opened)
            _read(opened, _spread(min(len(opened), expected), limit), findings, decode=decode)
    return findings


def _read(
    opened: OpenShard, indices: Sequence[int], findings: ShardFindings, *, decode: bool
) -> None:
    bad: Counter[str] = Counter()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about defects that are counted here
        for index in indices:
            try:
                _read_sample(opened, index, findings, decode=decode)
            except BadSample as error:
                bad[error.cause] += 1
    findings.seconds = time.perf_counter() - start
    findings.read = len(indices)
    findings.samples_by_cause.update(bad)
    findings.shards_by_cause.update(bad.keys())


def _read_sample(opened: OpenShard, index: int, findings: ShardFindings, *, decode: bool) -> None:
    """Read the text first, then the image, as training does: the first defect counts."""
    text = opened.read(index, "text", max_bytes=MAX_TEXT_BYTES)
    findings.bytes_read += len(text)
    caption = decode_text(text)
    content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
    findings.bytes_read += len(content)
    with open_image(content) as image:
        size, kind, mode = image.size, image.format or "", image.mode
    if decode:
        decode_image(content)
    findings.characters[len(caption)] += 1
    findings.tokens[_tokenizer().count(caption)] += 1
    findings.sizes[size] += 1
    findings.image_bytes[len(content)] += 1
    findings.formats[kind] += 1
    findings.modes[mode] += 1


def _note(findings: ShardFindings, problem: ShardProblem) -> None:
    missing = problem.expected - problem.found
    if problem.cause in ("shard_long", "keys_repeated"):
        missing = -missing  # samples beyond the expected ones
    problem_samples = max(0, missing)
    findings.samples_by_cause[problem.cause] += problem_samples
    findings.shards_by_cause[problem.cause] += 1
    findings.problems.append(asdict(problem) | {"samples": problem_samples})


def _spread(length: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` evenly spaced indices below ``length``."""
    count = length if limit is None else min(length, limit)
    return [i * length // count for i in range(count)]


class _SizesFiles:
    """The files ``sizes.json`` in the folders of local shards."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._num_shards = Counter(_local_path(shard.url).parent for shard in shards)
        self._sizes: dict[Path, dict[str, int]] = {folder: {} for folder in self._num_shards}
        for folder in self._num_shards:
            if not os.access(folder, os.W_OK):  # reported now, not after hours of reading
                raise PermissionError(f"write_sizes must be able to write into {folder}")

    def add(self, shard: Shard, num_samples: int) -> None:
        path = _local_path(shard.url)
        self._sizes[path.parent][path.name] = num_samples

    def write(self) -> dict[str, dict[str, int]]:
        """Update the files; return the number of shards and of written entries for each file."""
        report = {}
        for folder, sizes in self._sizes.items():
            path = folder / "sizes.json"
            before = json.loads(path.read_text()) if path.exists() else {}
            content = json.dumps(before | sizes, indent=4, sort_keys=True)
            write_atomically(path, content + "\n")
            report[str(path)] = {"shards": self._num_shards[folder], "written": len(sizes)}
        return report


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
    """Run the command line and return the exit code: 0, also for damaged shards, or 2."""
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
        description="Report the content of shards and the samples that training cannot use.",
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards, as in data.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--max-shards", type=int, metavar="N", help="inspect N shards, evenly spaced"
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
        help="decode images instead of reading only their headers; default: yes",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder for copies of remote shards")
    parser.add_argument(
        "--write-sizes",
        action="store_true",
        help="write the number of samples of local shards to sizes.json beside them",
    )
    return parser

"""``linclip shards inspect``: report the content of shards and its defects.

Samples are read and checked as in training; defects have the names under which a run counts them.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cache, partial
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

from ds_linclip.config import (
    CacheConfig,
    CaptionSource,
    NetworkConfig,
    Source,
    captions_of,
)
from ds_linclip.data.caption_choice import CaptionChoice
from ds_linclip.data.captions import CaptionTokenizer
from ds_linclip.data.causes import printable
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.data.prepare.inspection_figure import draw_inspection
from ds_linclip.data.prepare.inspection_report import (
    CONTEXT_LENGTH,
    ShardFindings,
    summarise,
    to_text,
)
from ds_linclip.data.remote import Storage, is_remote, local_path, redact
from ds_linclip.data.sample_reader import open_shard
from ds_linclip.data.shard_index import Shard, find_shards
from ds_linclip.data.tar_index import BadSample, OpenShard
from ds_linclip.data.transforms import (
    MAX_IMAGE_BYTES,
    decode_image,
    open_image,
)
from ds_linclip.process.atomic import write_atomically
from ds_linclip.process.progress import progress

__all__ = ["inspect_shards", "run"]


def inspect_shards(
    patterns: Sequence[str],
    *,
    max_shards: int | None = None,
    max_samples: int | None = None,
    num_workers: int = 1,
    decode: bool = True,
    cache_dir: str | None = None,
    write_sizes: bool = False,
    captions: Sequence[CaptionSource] = (),
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
        captions: Where the captions are, as in ``data.captions``. Of each sample one is drawn.

    Returns:
        The report, ready for JSON.

    Raises:
        ValueError: for a pattern that :func:`find_shards` refuses, or arguments that
            ``write_sizes`` does not allow.
        OSError: when a shard cannot be reached or ``sizes.json`` cannot be written.
    """
    for name, value in (("max_shards", max_shards), ("max_samples", max_samples)):
        if write_sizes and value is not None:
            raise ValueError(f"{name} ({value}) must be left out with write_sizes")
    if write_sizes:
        _check_local(patterns)
    sources = [Source(shards=pattern) for pattern in patterns]
    groups = find_shards(sources, _storage(cache_dir), count_headers=False)
    listed = [shard for group in groups for shard in group.shards]
    if write_sizes:
        _check_writable(listed)
    shards = [listed[i] for i in _spread(len(listed), max_shards)]
    quotas: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        ends = [max_samples * i // len(shards) for i in range(len(shards) + 1)]
        quotas = [end - start for start, end in pairwise(ends)]
    total = ShardFindings()
    sizes: dict[Path, int | None] = {}
    start = time.perf_counter()
    choose = CaptionChoice(captions, seed=0)
    inspect = partial(_inspect, choose=choose, decode=decode, cache_dir=cache_dir)
    found = ordered_map(inspect, zip(shards, quotas, strict=True), num_workers=num_workers)
    with closing(found), progress(found, total=len(shards), unit="shard") as bar:
        for shard, findings in zip(shards, bar, strict=True):
            total.add(findings)
            if write_sizes:
                sizes[Path(local_path(shard.url))] = findings.found if findings.is_whole else None
    seconds = time.perf_counter() - start
    return {
        "patterns": list(patterns),
        "decode": decode,
        "shards": {"listed": len(listed), "inspected": len(shards), "unsized": total.unsized},
        "sizes_files": _write_sizes(sizes) if write_sizes else {},
        **summarise(total, seconds=seconds, num_workers=num_workers),
    }


def _inspect(
    task: tuple[Shard, int | None],
    *,
    choose: CaptionChoice,
    decode: bool,
    cache_dir: str | None,
) -> ShardFindings:
    """Inspect a shard: all its samples, or as many as given, evenly spaced."""
    shard, limit = task
    opened, problems = open_shard(shard, _storage(cache_dir), choose.members)
    # Training reads no samples beyond the expected number.
    expected = shard.num_samples if shard.exact or isinstance(opened, BadSample) else len(opened)
    findings = ShardFindings(expected=expected, unsized=int(not shard.exact))
    for problem in problems:
        if problem.is_of_members:
            first = f"{problem.first} of {problem.url}"
            findings.passed_over.add(problem.cause, first, problem.found)
            continue
        excess = problem.found - problem.expected
        count = max(0, excess if problem.cause in ("shard_long", "keys_repeated") else -excess)
        findings.bad_samples.add(problem.cause, problem.url, count)
        fields = {name: value for name, value in asdict(problem).items() if name != "first"}
        findings.problems.append(fields | {"samples": count})
    if isinstance(opened, OpenShard):
        with closing(opened):
            findings.found = len(opened)
            indices = _spread(min(len(opened), expected), limit)
            _read(opened, indices, findings, choose=choose, decode=decode)
    findings.shards_by_cause.update(
        [*findings.bad_samples, *findings.passed_over, *findings.captions]
    )
    return findings


def _read(
    opened: OpenShard,
    indices: Sequence[int],
    findings: ShardFindings,
    *,
    choose: CaptionChoice,
    decode: bool,
) -> None:
    url = redact(opened.url)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about defects that are counted here
        for index in indices:
            example = f"{printable(opened.keys[index])} of {url}"
            try:
                caption = choose(opened, index, index)
                _read_sample(opened, index, caption.text, findings, decode=decode)
                for cause in caption.passed_over:
                    findings.captions.add(cause, example)
            except BadSample as error:
                findings.bad_samples.add(error.cause, example)
    findings.seconds = time.perf_counter() - start
    findings.read = len(indices)


def _read_sample(
    opened: OpenShard, index: int, caption: str, findings: ShardFindings, *, decode: bool
) -> None:
    """Read the image after the text, as training does: the first defect counts."""
    findings.bytes_read += len(caption.encode())
    content = opened.read(index, "image", max_bytes=MAX_IMAGE_BYTES)
    findings.bytes_read += len(content)
    with open_image(content) as image:
        size, kind, mode = image.size, image.format or "", image.mode
    if decode:
        decode_image(content)
    findings.characters[len(caption.strip())] += 1
    findings.tokens[len(_tokenizer().encode(caption)) + 2] += 1  # with start and end
    findings.sizes[size] += 1
    findings.image_bytes[len(content)] += 1
    findings.formats[kind] += 1
    findings.modes[mode] += 1


def _spread(length: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` evenly spaced indices below ``length``."""
    count = length if limit is None else min(length, limit)
    return [i * length // count for i in range(count)]


def _check_local(urls: Iterable[str]) -> None:
    for url in filter(is_remote, urls):
        raise ValueError(f"write_sizes needs local shards; {redact(url)} is remote")


def _check_writable(shards: Sequence[Shard]) -> None:
    """Check before hours of reading that ``sizes.json`` can be written beside the shards."""
    _check_local(shard.url for shard in shards)
    for folder in {Path(local_path(shard.url)).parent for shard in shards}:
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"write_sizes must be able to write into {folder}")


def _write_sizes(sizes: Mapping[Path, int | None]) -> dict[str, dict[str, int]]:
    """Update every ``sizes.json``; return its numbers of shards and of written entries."""
    report = {}
    folder_of = attrgetter("parent")
    for folder, paths in groupby(sorted(sizes, key=folder_of), folder_of):
        found = {path.name: sizes[path] for path in paths}
        whole = {name: size for name, size in found.items() if size is not None}
        path = folder / "sizes.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write_atomically(path, json.dumps(before | whole, indent=4, sort_keys=True) + "\n")
        report[str(path)] = {"shards": len(found), "written": len(whole)}
    return report


@cache
def _storage(cache_dir: str | None) -> Storage:
    return Storage(CacheConfig(dir=cache_dir), NetworkConfig())


@cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(CONTEXT_LENGTH)


def run(options: argparse.Namespace) -> None:
    """Write the report of a command line, and print it; damaged shards are no error.

    Raises:
        ValueError, OSError: see :func:`inspect_shards`.
    """
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "words")}
    settings["captions"] = captions_of(settings["captions"])
    options.out.mkdir(parents=True, exist_ok=True)
    report = inspect_shards(**settings)
    (options.out / "report.json").write_text(json.dumps(report, indent=4) + "\n")
    draw_inspection(report).savefig(options.out / "report.png")
    sys.stdout.write(f"{to_text(report)}\nreport: {options.out}/report.json, report.png\n")

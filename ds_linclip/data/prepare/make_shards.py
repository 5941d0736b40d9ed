"""``linclip shards make``: write a data set as shards.

A data set is complete or not there: it is written beside OUT and renamed at the end. A complete one
is left as it is.
"""

import argparse
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ds_linclip.config.paths import saved_path
from ds_linclip.data.causes import printable
from ds_linclip.data.parallel_map import ordered_map
from ds_linclip.data.prepare import digits, synthetic_scenes
from ds_linclip.data.prepare.image_text_files import (
    PairLoader,
    PairSet,
    ResizeMode,
    folder_pairs,
    further_captions,
    table_pairs,
)
from ds_linclip.data.prepare.shard_writer import (
    EncodedSample,
    FailedSample,
    RawSample,
    write_labelled_folder,
    write_once,
    write_train_shard,
)
from ds_linclip.data.tally import Tally
from ds_linclip.process.progress import progress

__all__ = ["make_digits", "make_pairs", "make_scenes", "run"]

_SIDES = range(4, 8193)  # sides in pixels of an image that the decoder accepts
_MAX_SAMPLES_PER_SHARD = 10_000  # keys have four digits for the index
_MAX_SHARDS = 100_000  # and five for the shard
_DIGIT_SHARDS = 8


def make_digits(out: Path, *, image_size: int = 32, seed: int = 0) -> bool:
    """Write the captioned digits: ``OUT/train`` (8 shards) and ``OUT/test`` (the held-out fifth).

    Arguments, result and errors are those of :func:`make_scenes`; ``seed`` is that of the captions.
    """
    record = {"name": "digits", "image_size": image_size, "seed": seed}

    def write(folder: Path) -> None:
        train, test = (
            digits.digit_samples(split, image_size=image_size, seed=seed)
            for split in ("train", "test")
        )
        samples = list(train)
        shards = (samples[number::_DIGIT_SHARDS] for number in range(_DIGIT_SHARDS))
        _write_shards(folder / "train", shards, len(samples), "digits")
        write_labelled_folder(
            folder / "test", test, classnames=digits.CLASSNAMES, templates=digits.TEMPLATES
        )

    return write_once(out, record, write)


def make_scenes(
    out: Path,
    *,
    num_shards: int,
    samples_per_shard: int,
    image_size: int,
    seed: int = 0,
    num_test: int = 0,
) -> bool:
    """Write synthetic scenes: ``OUT/train`` and, for ``num_test > 0``, two held-out folders.

    ``OUT/test`` has the pairs of colour and shape that occur in training, ``OUT/test_unseen`` has
    the others.

    Args:
        out: A folder that does not exist, is empty, or holds the same data set.
        num_shards, samples_per_shard: The number of training shards, and of scenes in each of them.
        image_size: The side of the images in pixels.
        seed: The seed of all scenes, not negative.
        num_test: The number of scenes in each held-out folder.

    Returns:
        Whether the data set was written; False when ``out`` held it already.

    Raises:
        ValueError: for too many samples per shard, or when ``out`` holds anything else.
    """
    _check_samples_per_shard(samples_per_shard)
    record = {
        "name": "scenes",
        "num_shards": num_shards,
        "samples_per_shard": samples_per_shard,
        "image_size": image_size,
        "seed": seed,
        "num_test": num_test,
    }

    def write(folder: Path) -> None:
        total = num_shards * samples_per_shard
        scenes = (
            synthetic_scenes.training_scene(index, image_size=image_size, seed=seed)
            for index in range(total)
        )
        shards = (islice(scenes, samples_per_shard) for _ in range(num_shards))
        _write_shards(folder / "train", shards, total, "scenes")
        for split in ("test", "test_unseen") if num_test else ():
            write_labelled_folder(
                folder / split,
                synthetic_scenes.labelled_scenes(
                    split, num_samples=num_test, image_size=image_size, seed=seed
                ),
                classnames=synthetic_scenes.CLASSNAMES,
                templates=synthetic_scenes.TEMPLATES,
            )

    return write_once(out, record, write)


def make_pairs(
    out: Path,
    pairs: PairSet,
    *,
    samples_per_shard: int = 10_000,
    resize: ResizeMode = "no",
    image_size: int | None = None,
    shuffle_seed: int | None = 0,
    num_workers: int = 1,
    unusable: Tally | None = None,
) -> Tally | None:
    """Write images and captions from files as shards ``OUT/NNNNN.tar``.

    A bad pair becomes a failed row of the parquet, like a failed download of img2dataset.

    Args:
        out: See :func:`make_scenes`.
        pairs: The pairs to write.
        samples_per_shard: The number of pairs per shard, failed ones included.
        resize: See :class:`ds_linclip.data.prepare.image_text_files.PairLoader`.
        image_size: The side in pixels; None if and only if ``resize`` is "no".
        shuffle_seed: The seed of the order; None keeps the order of ``pairs``. Files of one folder
            are often alike, and training shuffles only within a few shards.
        num_workers: Processes that read and resize; the bytes written do not depend on it.
        unusable: Counts the further captions that are left out, by column and cause.

    Returns:
        The number of pairs as ``success``, and of failures by cause, with the image of one of them;
        None when ``out`` held the same data set already.

    Raises:
        ValueError: for a number out of range, when ``out`` holds anything else, or when all pairs
            are bad.
    """
    _check_samples_per_shard(samples_per_shard)
    record = {
        "name": "pairs",
        "num_pairs": len(pairs.images),
        "fingerprint": pairs.fingerprint,
        "samples_per_shard": samples_per_shard,
        "resize": resize,
        "image_size": image_size,
        "shuffle_seed": shuffle_seed,
    }
    if (image_size is None) != (resize == "no"):
        raise ValueError(f"image_size ({image_size}) must be set unless resize ({resize}) is no")
    if image_size is not None and image_size not in _SIDES:
        raise ValueError(f"image_size ({image_size}) must be in {_SIDES[0]} ... {_SIDES[-1]}")
    num_shards = -(-len(pairs.images) // samples_per_shard)
    if num_shards > _MAX_SHARDS:
        raise ValueError(f"samples_per_shard ({samples_per_shard}) gives {num_shards} shards")
    order = list(range(len(pairs.images)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    counts = Tally()

    def with_captions(
        samples: Iterable[EncodedSample | FailedSample], numbers: Iterable[int]
    ) -> Iterator[EncodedSample | FailedSample]:
        left_out = Tally() if unusable is None else unusable
        for sample, number in zip(samples, numbers, strict=True):
            if isinstance(sample, EncodedSample):
                yield replace(sample, captions=further_captions(pairs, number, left_out))
            else:
                yield sample

    def write(folder: Path) -> None:
        load = PairLoader(pairs.root, resize, image_size or 0, pairs.captions_in_files)
        items = ((pairs.images[i], pairs.captions[i]) for i in order)
        loaded = ordered_map(load, items, num_workers=num_workers)
        with closing(loaded), progress(loaded, total=len(order), unit="image") as bar:
            samples = _counted(with_captions(bar, order), counts)
            for number in range(num_shards):
                write_train_shard(folder, number, islice(samples, samples_per_shard))
        if not counts["success"]:
            raise ValueError(
                f"source ({pairs.source}) must hold a usable pair; all failed: {counts}"
            )

    return counts if write_once(out, record, write) else None


def _counted(
    samples: Iterable[EncodedSample | FailedSample], counts: Tally
) -> Iterator[EncodedSample | FailedSample]:
    """Yield the samples and count them."""
    for sample in samples:
        if isinstance(sample, FailedSample):
            counts.add(sample.cause, sample.url or "(no path)")
        else:
            counts["success"] += 1
        yield sample


def _write_shards(
    folder: Path, shards: Iterable[Iterable[RawSample]], num_samples: int, name: str
) -> None:
    folder.mkdir()
    with progress(total=num_samples, desc=name, unit="image") as bar:
        for number, shard in enumerate(shards):
            counts = write_train_shard(folder, number, (sample.encode() for sample in shard))
            bar.update(counts.total())


def _check_samples_per_shard(value: int) -> None:
    if value > _MAX_SAMPLES_PER_SHARD:
        raise ValueError(f"samples_per_shard ({value}) must be at most {_MAX_SAMPLES_PER_SHARD}")


def run(options: argparse.Namespace) -> None:
    """Write the data set of a command line, and print a summary.

    Raises:
        ValueError, OSError: see :func:`make_scenes` and :func:`make_pairs`.
    """
    settings = {key: value for key, value in vars(options).items() if key not in ("kind", "words")}
    summary = _write(options.kind, settings)
    sys.stdout.write(f"{options.kind} in {printable(str(options.out))}: {summary}\n")


def _write(kind: str, options: dict[str, Any]) -> str:
    """Write the data set and return a summary; options have the names of the arguments above."""
    if kind in ("digits", "scenes"):
        make: Callable[..., bool] = make_digits if kind == "digits" else make_scenes
        return "written" if make(**options) else "already complete"
    source = options.pop("source")
    if kind == "csv":
        columns = options.pop("caption_column")
        names = ("image_column", "separator")
        pairs = table_pairs(
            source,
            caption_column=columns[0],
            further_columns=columns[1:],
            **{name: options.pop(name) for name in names},
        )
    else:
        pairs = folder_pairs(source)
    last = (len(pairs.images) - 1) // options["samples_per_shard"]
    override = _override(options["out"], "00000" if last == 0 else f"{{00000..{last:05d}}}")
    unusable = Tally()
    counts = make_pairs(pairs=pairs, unusable=unusable, **options)
    return "\n".join([*_summary(counts, pairs, unusable), override])


def _summary(counts: Tally | None, pairs: PairSet, unusable: Tally) -> list[str]:
    """Return lines that say what became of every pair and file."""
    passed_over = f"{pairs.passed_over.total()} passed over"
    if counts is None:
        lines = [f"already complete, {passed_over}"]
    else:
        samples = counts.pop("success")
        lines = [f"written, {samples} samples, {counts.total()} failed, {passed_over}"]
        lines += counts.lines()
    if unusable:
        lines += ["further captions that cannot be used, left out:", *unusable.lines()]
    if pairs.passed_over:
        lines += ["passed over:", *pairs.passed_over.lines()]
    if pairs.shared_captions:
        lines += ["samples with the caption file of another one:", *pairs.shared_captions.lines()]
    return lines


def _override(out: Path, name: str) -> str:
    """Return the setting that trains on the shards, as a word of a shell.

    Raises:
        ValueError: when no config can hold the path.
    """
    folder = os.path.abspath(out)
    if re.search("[\ud800-\udfff]", folder):
        raise ValueError(f"out ({printable(folder)}) must be UTF-8, as config paths")
    escaped = re.sub(r"([\\{},])", r"\\\1", folder)  # its braces are no pattern
    text = yaml.safe_dump(
        [f"{saved_path(escaped)}/{name}.tar"],
        default_flow_style=True,
        default_style='"',
        allow_unicode=True,
        width=sys.maxsize,
    )
    return shlex.quote(f"data.train={text.strip()}")

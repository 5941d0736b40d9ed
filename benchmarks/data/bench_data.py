"""Training-data throughput: this project's loader against open_clip_train's, on the same shards.

``python -m benchmarks.data.bench_data [OUTPUT_FOLDER]`` writes shards of photos, measures both
loaders in turn, each time in a process of its own, what bad images cost, and how long the embedded
training run waits for data. It prints summary.md and writes it, data.csv (one row per measurement)
and data.png into OUTPUT_FOLDER. Exit codes: 0 every requirement is met, 1 one is not, 2 it could
not be measured.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import REPOSITORY, BenchmarkParser
from benchmarks.data import loaders
from benchmarks.data.report import RATES, DataReport, Requirement
from ds_linclip.data.prepare.shard_writer import EncodedSample, RawSample, write_train_shard
from ds_linclip.process.progress import progress

MEASURED = ("ds_linclip/data", "benchmarks/data")
PACKAGES = ("torch", "open_clip_torch", "webdataset", "simplejpeg", "pillow")
#: Packages that the data module of open_clip_torch 3.3.0 needs for training. With the
#: webdataset of this project its loader ends in KeyError: 'fname': it does not know the mark that
#: newer versions put at the end of every shard.
OPEN_CLIP_PACKAGES = ("webdataset==0.2.86", "pandas>=3")
LOADERS_SCRIPT = loaders.__file__
NUM_SHARDS = 4
BAD_SHARE = 0.05
#: Sides of the crops from the sample photos, which are 427 pixels high: at their smallest a 256 px
#: image keeps the photo's own pixels, at their largest it has its detail.
CROP_SIDES = (256, 427)
CLEAN, DIRTY, LARGE, SMALL = (
    "256 px, to 224 px",
    "256 px, to 224 px, 5 % truncated",
    "512 px, to 224 px",
    "512 px, to 112 px",
)
#: Case -> what :func:`write_shards` calls its shards, and the side of the output.
CASES = {CLEAN: ("clean", 224), DIRTY: ("dirty", 224), LARGE: ("large", 224), SMALL: ("large", 112)}
#: Intervals of the training run that are not counted: workers start in the first.
SKIPPED_INTERVALS = 1
MIN_RATIO, MAX_LOSS, MAX_WAIT = 2.0, 0.10, 0.02
NOTES = """\
- Every measurement is a process of its own with one thread, and the loaders take turns. The time is
  that between two batches, one epoch apart, after the first quarter of an epoch; CPU time is that
  of the process and its workers.
- Both loaders read the files of the same shards from the page cache, decode, crop (scale 0.9 to 1),
  resize (bicubic, antialiased), tokenise, shuffle, batch and normalise, which ds_linclip does in
  the training process, open_clip_train in the worker; both figures include it.
- open_clip_train's loader is get_wds_dataset with open_clip's image_transform and tokenizer, with
  the webdataset that its package asks for; all else is the same.
- Photos are crops of the two sample photos of scikit-learn; those of 512 px are enlarged.
- Truncated images are cut in half; ds_linclip replaces each by another sample of the shard.
- Waiting for data is the sum of perf/data_seconds_per_step over that of perf/seconds_per_step,
  without the first logging interval."""


#: A row of data.csv; see :class:`DataReport`.
Row = dict[str, Any]


@dataclass(frozen=True)
class Shards:
    """Shards that were written, and their content."""

    paths: list[str]
    num_samples: int
    num_bad: int
    bytes_per_image: float


def main() -> int:
    start = time.monotonic()
    parser = BenchmarkParser("data", __doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--batches-per-shard", type=int, default=10)
    parser.add_argument("--training-steps", type=int, default=200, help="0: no training run")
    parser.add_argument(
        "--without-open-clip", action="store_true", help="where packages cannot be installed"
    )
    arguments = parser.parse_args()
    parser.check_positive(arguments, "workers", "repetitions", "batch_size", "batches_per_shard")
    output, facts = parser.begin(arguments, "cpu", MEASURED, PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows, requirements = _measure_all(Path(folder), arguments)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            last = reason.strip().splitlines()[-1].removeprefix("error: ")
            print(f"error: {last}", file=sys.stderr)
            return 2
    facts |= {name: str(getattr(arguments, name)) for name in ("workers", "repetitions")}
    facts |= {"batch size": str(arguments.batch_size), **_conditions(rows)}
    facts["duration"] = f"{time.monotonic() - start:.0f} s"
    print(DataReport(rows).write(output, facts, requirements, NOTES))
    return 0 if all(requirement.passed for requirement in requirements) else 1


def _measure_all(
    folder: Path, arguments: argparse.Namespace
) -> tuple[list[Row], list[Requirement]]:
    names = ["ds_linclip"]
    if not arguments.without_open_clip:
        install_for_open_clip(folder / "packages")
        names.append("open_clip")
    sets = write_shards(folder, arguments.batches_per_shard * arguments.batch_size)
    plan = [
        (repetition, case, loader)
        for repetition in range(arguments.repetitions)
        for case in CASES
        for loader in names
        if (case, loader) != (DIRTY, "open_clip")
    ]
    rows = []
    for repetition, case, loader in progress(plan, desc="bench", unit="run"):
        name, image_size = CASES[case]
        batches = sets[name].num_samples // arguments.batch_size
        settings = {
            "loader": loader,
            "num_samples": sets[name].num_samples,
            "image_size": image_size,
            "batch_size": arguments.batch_size,
            "num_workers": arguments.workers,
            "warmup_batches": -(-batches // 4),
            "batches": batches,
        }
        packages = folder / "packages" if loader == "open_clip" else None
        found = measure_apart({"shards": sets[name].paths, **settings}, packages)
        size = round(sets[name].bytes_per_image)
        place = {"case": case, "repetition": repetition, "bytes_per_image": size}
        rows.append(place | settings | found)
    requirements = check_requirements(rows, sets["dirty"].num_bad)
    if arguments.training_steps:
        share = waiting_share(training_metrics(folder / "runs", arguments.training_steps))
        name = "share of the embedded run spent waiting for data"
        values = f"<= {MAX_WAIT:.0%}", f"{share:.2%}", share <= MAX_WAIT
        requirements.append(Requirement(name, *values))
    return rows, requirements


def write_shards(folder: Path, samples_per_shard: int) -> dict[str, Shards]:
    """Write photos as "clean" shards, the same ones as "dirty" and bigger ones as "large".

    Args:
        folder: Gets a folder of shards for each.
        samples_per_shard: Size of a shard in "clean" and "dirty"; "large" has a quarter of it.
    """
    clean = list(islice(photos(256), NUM_SHARDS * samples_per_shard))
    bad = set(random.Random(0).sample(range(len(clean)), round(BAD_SHARE * len(clean))))
    dirty = [
        replace(one, image=one.image[: len(one.image) // 2]) if index in bad else one
        for index, one in enumerate(clean)
    ]
    large = list(islice(photos(512), max(len(clean) // 4, NUM_SHARDS)))
    return {
        "clean": _write(folder / "clean", clean),
        "dirty": _write(folder / "dirty", dirty, num_bad=len(bad)),
        "large": _write(folder / "large", large),
    }


def photos(image_size: int) -> Iterator[EncodedSample]:
    """Yield crops of scikit-learn's two sample photos without end, as JPEGs with captions."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    words = " ".join(IMAGENET_CLASSNAMES).split()
    rng = random.Random(0)
    while True:
        photo, side = rng.choice(whole), rng.randint(*CROP_SIDES)
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        box = (left, top, left + side, top + side)
        image = photo.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
        caption = " ".join(rng.choices(words, k=rng.randint(4, 18)))
        yield RawSample(image, caption, "https://scikit-learn.org", photo.size).encode()


def install_for_open_clip(folder: Path) -> None:
    """Install what open_clip_train's loader needs into a folder, to be found before our own.

    Raises:
        OSError: when the packages cannot be installed.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    target = ["--no-deps", "--target", str(folder)]  # everything they depend on is installed
    if subprocess.run([*pip, *target, *OPEN_CLIP_PACKAGES], capture_output=True).returncode:
        packages = " and ".join(OPEN_CLIP_PACKAGES)
        raise OSError(
            f"open_clip_train needs {packages}, which pip could not install; "
            "--without-open-clip leaves it out"
        )


def measure_apart(arguments: dict[str, Any], packages: Path | None) -> dict[str, Any]:
    """Return what ``loaders.measure`` does in a new process that finds ``packages`` first.

    Raises:
        CalledProcessError: with the process's standard error, when it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if packages:
        paths = filter(None, [str(packages), os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, LOADERS_SCRIPT, json.dumps(arguments)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_requirements(rows: Sequence[Row], num_bad: int) -> list[Requirement]:
    """Return a verdict on every requirement that the rows say something about.

    Args:
        rows: Measurements of one run.
        num_bad: Truncated images in the dirty shards.
    """
    report = DataReport(rows)
    verdicts = []
    for rate, title in RATES.items():
        if (CLEAN, "open_clip") in report.lines:
            middle, low, high = report.over_open_clip(CLEAN, rate)
            name, rule = f"{title} over open_clip_train's, {CLEAN}", f">= {MIN_RATIO:g}x"
            found = f"{middle:.2f}x ({low:.2f} ... {high:.2f})"
            verdicts.append(Requirement(name, rule, found, middle >= MIN_RATIO))
    for rate, title in RATES.items():
        kept = report.ratio(rate, (DIRTY, "ds_linclip"), (CLEAN, "ds_linclip"))
        middle, low, high = (1 - x for x in kept)
        name, rule = f"loss of {title} with 5 % truncated images", f"<= {MAX_LOSS:.0%}"
        found = f"{middle:.1%} ({high:.1%} ... {low:.1%})"
        verdicts.append(Requirement(name, rule, found, middle <= MAX_LOSS))
    counts = [row["skipped"] for row in rows if row["case"] == DIRTY]
    totals = sorted(set(counts))
    clean = sum(row["skipped"] for row in rows if row["case"] != DIRTY)
    name = "truncated images that were skipped and counted in one epoch"
    found = f"{', '.join(map(str, totals))} in each of {len(counts)} runs; {clean} where none is"
    passed = totals == [num_bad] and clean == 0
    return [*verdicts, Requirement(name, f"{num_bad} of {num_bad}", found, passed)]


def training_metrics(output: Path, steps: int) -> list[dict[str, float]]:
    """Train the embedded config, two logging intervals or more, and return its metrics."""
    overrides = [f"output_dir={output}", "name=wait", f"train.steps={steps}"]
    overrides += ["optim.warmup_steps=1", "eval.every_steps=0", "log.tensorboard=false"]
    command = [sys.executable, "-m", "linclip_launch", "train", "embedded", *overrides]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    lines = (output / "wait" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def waiting_share(metrics: Iterable[dict[str, float]]) -> float:
    """Return the share of a step's time spent waiting for data, without the first interval."""
    intervals = [record for record in metrics if "perf/seconds_per_step" in record]
    waited, passed = (
        sum(record[f"perf/{name}_per_step"] for record in intervals[SKIPPED_INTERVALS:])
        for name in ("data_seconds", "seconds")
    )
    return waited / passed


def _write(folder: Path, samples: Sequence[EncodedSample], num_bad: int = 0) -> Shards:
    folder.mkdir()
    for number in range(NUM_SHARDS):
        write_train_shard(folder, number, samples[number::NUM_SHARDS])
    return Shards(
        paths=[str(folder / f"{number:05d}.tar") for number in range(NUM_SHARDS)],
        num_samples=len(samples),
        num_bad=num_bad,
        bytes_per_image=sum(len(sample.image) for sample in samples) / len(samples),
    )


def _conditions(rows: Sequence[Row]) -> dict[str, str]:
    """Return what the rows tell of packages and photos."""
    facts = {"python": platform.python_version()}
    for row in rows:
        if row["loader"] == "open_clip":
            facts["webdataset of open_clip_train"] = row["webdataset"]
        if row["case"] in (CLEAN, LARGE):
            facts[f"{row['case'].partition(',')[0]}:"] = (
                f"{row['num_samples']} photos, JPEG of quality 95, "
                f"{row['bytes_per_image'] / 1000:.1f} kB each"
            )
    return facts


if __name__ == "__main__":
    sys.exit(main())

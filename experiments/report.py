"""Every evaluation on the embedded data, in small, as one page: ``python -m experiments.report``.

Trains the runs of scaling_runs.py, asks the largest softmax and the largest linear one everything
that linclip-eval can ask, and puts the answers together in OUTPUT_FOLDER/report.html. What is there
is not done again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from ds_linclip.data.prepare.digits import CLASSNAMES, TEMPLATES, digit_samples
from ds_linclip.data.prepare.shard_writer import write_labelled_folder
from linclip_eval.commands.report import write_report

REPOSITORY = Path(__file__).parents[1]
EMBEDDED = Path("data/embedded")
#: Other pictures of the same digits.
DOMAINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": ImageOps.invert,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
}
WIDTHS, STEPS = (32, 64, 96), (150, 450)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("output", type=Path, nargs="?", help="default: runs/report")
    parser.add_argument("--seeds", type=int, default=1, help="of every run")
    options = parser.parse_args()
    out = options.output.resolve() if options.output else Path("runs/report")
    os.chdir(REPOSITORY)  # so that what is written names no place outside of it
    runs = {
        attention: out / "runs" / f"{attention}_width{WIDTHS[-1]}_steps{STEPS[-1]}_seed0"
        for attention in ("softmax", "linear")
    }
    models = [f"{attention}={run}" for attention, run in runs.items()]
    test = EMBEDDED / "test"
    domains = [f"digits={test}", *(f"{name}={out / 'domains' / name}" for name in DOMAINS)]
    stages: dict[str, Sequence[object]] = {
        **{f"zero-shot-{name}": ("zero-shot", run, "--data", test) for name, run in runs.items()},
        **{f"retrieval-{name}": ("retrieval", run, "--data", test) for name, run in runs.items()},
        **{
            f"probe-{name}": ("probe", run, "--train", out / "domains" / "train", "--test", test)
            for name, run in runs.items()
        },
        "resolution": ("resolution", *models, "--data", *domains, "--sizes", 16, 24, 32, 48, 64),
        "diagnostics": ("diagnostics", *_of_every_size(out), "--data", test),
        "scaling-laws": ("scaling-laws", *_names_of_runs(out, options.seeds)),
        "runtime": ("runtime", "--budget-seconds", 90),
    }
    try:
        sizes = ["--widths", *WIDTHS, "--steps", *STEPS, "--seeds", options.seeds]
        _run(["experiments/scaling_runs.py", out, *sizes])
        _write_domains(out / "domains")
        for name, stage in tqdm(stages.items(), "evaluations", unit="evaluation"):
            command = ["-m", "linclip_eval", *map(str, stage), "--out", str(out / name)]
            # Written when it has ended: what was cut off, or asked otherwise, is done again.
            done = out / name / "command.json"
            if not done.exists() or json.loads(done.read_text()) != command:
                _run(command, out / f"{name}.log")
                done.write_text(json.dumps(command))
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return 2
    page = write_report([out / name for name in stages], out, title="The embedded runs, evaluated")
    print(page)
    return 0


def _of_every_size(out: Path) -> list[str]:
    """The longest run of every size with each attention, labelled."""
    return [
        f"{attention} {width}={out / 'runs' / f'{attention}_width{width}_steps{STEPS[-1]}_seed0'}"
        for attention in ("softmax", "linear")
        for width in WIDTHS
    ]


def _names_of_runs(out: Path, seeds: int) -> list[Path]:
    return [
        out / "runs" / f"{attention}_width{width}_steps{steps}_seed{seed}"
        for attention in ("softmax", "linear")
        for width in WIDTHS
        for steps in STEPS
        for seed in range(seeds)
    ]


def _run(arguments: Sequence[object], log: Path | None = None) -> None:
    command = [sys.executable, *map(str, arguments)]
    if log is None:
        subprocess.run(command, check=True)
        return
    with log.open("w") as file:
        try:
            subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)
        except subprocess.CalledProcessError:
            print(log.read_text()[-2000:], file=sys.stderr)
            raise


def _write_domains(folder: Path) -> None:
    """The held-out digits changed in one way each, and the training digits with their labels."""
    for name, change in {"train": None, **DOMAINS}.items():
        if (folder / name).exists():
            continue
        samples = digit_samples("test" if change else "train", image_size=32, seed=0)
        if change:
            samples = (replace(sample, image=change(sample.image)) for sample in samples)
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_labelled_folder(partial, samples, classnames=CLASSNAMES, templates=TEMPLATES)
        partial.rename(folder / name)


if __name__ == "__main__":
    sys.exit(main())

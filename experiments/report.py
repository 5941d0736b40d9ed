"""Every evaluation on the embedded data, in small, as one page: ``python -m experiments.report``.

Trains the runs of scaling_runs.py, evaluates the largest softmax and the largest linear one with
every command of linclip eval, and joins the results in OUTPUT_FOLDER/report.html. Finished stages
are not repeated.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from ds_linclip.data.prepare.digits import CLASSNAMES, TEMPLATES, digit_samples
from ds_linclip.data.prepare.shard_writer import write_labelled_folder
from ds_linclip.process.atomic import atomic_directory, write_atomically
from ds_linclip.process.progress import progress
from experiments.scaling_runs import ATTENTIONS, run_name, train_runs
from linclip_eval.commands.report import write_page

REPOSITORY = Path(__file__).parents[1]
EMBEDDED = Path("data/embedded")
#: Changes of the held-out digits, for evaluation on other domains.
DOMAINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": ImageOps.invert,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
}
WIDTHS, STEPS = (32, 64, 96), (150, 450)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("output", type=Path, nargs="?", help="default: runs/report")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every run")
    options = parser.parse_args()
    out = options.output.resolve() if options.output else Path("runs/report")
    os.chdir(REPOSITORY)  # so that the results name no path outside of it
    folders = {
        place: out / "runs" / run_name(*place)
        for place in product(ATTENTIONS, WIDTHS, STEPS, range(options.seeds))
    }
    runs = {a: folders[a, WIDTHS[-1], STEPS[-1], 0] for a in ATTENTIONS}
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
        # The held-out digits are too few for more than two clusters.
        **{
            f"audit-{name}": ("audit", run, "--data", EMBEDDED / "train")
            for name, run in runs.items()
        },
        "resolution": ("resolution", *models, "--data", *domains, "--sizes", 16, 24, 32, 48, 64),
        "diagnostics": (
            "diagnostics",
            *(f"{a} {w}={folders[a, w, STEPS[-1], 0]}" for a in ATTENTIONS for w in WIDTHS),
            *("--data", test),
        ),
        "scaling-laws": ("scaling-laws", *folders.values()),
        "runtime": ("runtime", "--budget-seconds", 90),
    }
    try:
        train_runs(out, widths=WIDTHS, steps=STEPS, seeds=options.seeds)
        _write_domains(out / "domains")
        for name, stage in progress(stages.items(), "evaluations", unit="evaluation"):
            command = ["-m", "linclip_launch", "eval", *map(str, stage), "--out", str(out / name)]
            # Written at the end: an interrupted stage, or one with another command, is repeated.
            done = out / name / "command.json"
            if not done.exists() or json.loads(done.read_text()) != command:
                _run(command, out / f"{name}.log")
                write_atomically(done, json.dumps(command))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = write_page([out / name for name in stages], out, title="The embedded runs, evaluated")
    print(page)
    return 0


def _run(arguments: Sequence[str], log: Path) -> None:
    """Run a Python program; raise ValueError when it fails."""
    command = [sys.executable, *arguments]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        print(log.read_text()[-2000:], file=sys.stderr)
        raise ValueError(f"{shlex.join(command)} ended with {done.returncode}")


def _write_domains(folder: Path) -> None:
    """Write the held-out digits with every change, and the training digits with their labels."""
    for name, change in {"train": None, **DOMAINS}.items():
        if (folder / name).exists():
            continue
        samples = digit_samples("test" if change else "train", image_size=32, seed=0)
        if change:
            samples = (replace(sample, image=change(sample.image)) for sample in samples)
        with atomic_directory(folder / name) as partial_folder:
            write_labelled_folder(
                partial_folder, samples, classnames=CLASSNAMES, templates=TEMPLATES
            )


if __name__ == "__main__":
    sys.exit(main())

"""Runs for scaling laws: sizes x attentions x lengths x seeds on the embedded dataset.

``python -m experiments.scaling_runs OUTPUT_FOLDER`` trains two runs at a time, one core each, into
OUTPUT_FOLDER/runs. Finished runs are not repeated, so that an interrupted study continues where it
stopped; other settings need another folder. The laws are fitted by

    linclip eval scaling-laws OUTPUT_FOLDER/runs --out RESULTS
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from ds_linclip.config import Config, load_config
from experiments.convergence import train_all
from linclip_eval.scaling_laws.runs import UnfinishedRun, read_run

__all__ = ["ATTENTIONS", "EMBEDDED", "run_name", "train_runs"]

EMBEDDED = "ds_configs/train/embedded.yaml"
#: Linear attention is Eq. 7, the default form.
ATTENTIONS = ("softmax", "linear")
_HEAD_WIDTH = 32


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default=EMBEDDED)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 450])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="dotted assignments for every run")
    try:
        train_runs(**vars(parser.parse_intermixed_args()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train_runs(
    output: Path,
    *,
    widths: Sequence[int],
    steps: Sequence[int],
    seeds: int,
    processes: int = 2,
    config: str = EMBEDDED,
    overrides: Sequence[str] = (),
) -> None:
    """Train every run that is not finished; both towers grow in width alone.

    The runs go to the folder ``runs`` of ``output``, under the names of :func:`run_name`.

    Raises:
        ValueError: for a config that is not valid, or a folder with runs of other settings.
    """
    configs = []
    for attention, width, length, seed in product(ATTENTIONS, widths, steps, range(seeds)):
        own = [
            *(f"model.{tower}.attention.kind={attention}" for tower in ("vision", "text")),
            *(f"model.{tower}.width={width}" for tower in ("vision", "text")),
            *(f"model.vision.head_width={_HEAD_WIDTH}", f"model.text.heads={width // _HEAD_WIDTH}"),
            f"output_dir={output / 'runs'}",
            f"name={run_name(attention, width, length, seed)}",
            *(f"train.steps={length}", f"train.seed={seed}", "train.global_batch_size=64"),
            *("data.num_workers=0", "log.every_steps=1", "log.tensorboard=false"),
            *("log.num_images=0", "eval.every_steps=0", "checkpoint.every_steps=0"),
        ]
        run = load_config(config, [*own, *overrides])
        if not _is_finished(run):
            configs.append((attention, run))
    # The longest first: the last one to end then ends soon after the one before.
    configs.sort(key=lambda each: each[1].train.steps * each[1].model.vision.width, reverse=True)
    for _ in train_all(configs, processes):
        pass


def run_name(attention: str, width: int, steps: int, seed: int) -> str:
    return f"{attention}_width{width}_steps{steps}_seed{seed}"


def _is_finished(config: Config) -> bool:
    """Return whether the run folder holds this run, finished."""
    if not (config.run_dir / "config.yaml").exists():
        return False
    try:
        found = read_run(config.run_dir).config
    except UnfinishedRun:
        return False
    if found != config:
        raise ValueError(
            f"output ({config.output_dir}) must be another folder: {config.run_dir} has other "
            "settings"
        )
    return True


if __name__ == "__main__":
    sys.exit(main())

"""Runs for scaling laws: sizes x attentions x lengths x seeds on the embedded dataset.

``python -m experiments.scaling_runs OUTPUT_FOLDER`` trains two runs at a time, one core each, into
OUTPUT_FOLDER/runs. Finished runs are not repeated, so that an interrupted study continues where it
stopped; other settings need another folder. The laws are fitted by

    linclip-eval scaling-laws OUTPUT_FOLDER/runs --out RESULTS
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from ds_linclip.config import Config, load_config
from experiments.convergence import train_all
from linclip_eval.scaling_laws.runs import UnfinishedRun, read_run

#: Linear attention is Eq. 7, the default form.
ATTENTIONS = ("softmax", "linear")
_HEAD_WIDTH = 32


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="ds_configs/train/embedded.yaml")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 450])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="dotted assignments for every run")
    arguments = parser.parse_intermixed_args()
    try:
        configs = [
            load_config(
                arguments.config,
                [*_overrides(arguments.output, *which), *arguments.overrides],
            )
            for which in product(
                ATTENTIONS, arguments.widths, arguments.steps, range(arguments.seeds)
            )
        ]
        configs = [config for config in configs if not _is_finished(config)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The longest first: the last one to end then ends soon after the one before.
    configs.sort(key=lambda c: c.train.steps * c.model.vision.width, reverse=True)
    named = [(config.model.vision.attention.kind, config) for config in configs]
    for _ in train_all(named, arguments.processes):
        pass
    return 0


def _overrides(output: Path, attention: str, width: int, steps: int, seed: int) -> list[str]:
    """Return overrides of one run: both towers grow in width alone, with heads of one width."""
    return [
        *(f"model.{tower}.attention.kind={attention}" for tower in ("vision", "text")),
        *(f"model.{tower}.width={width}" for tower in ("vision", "text")),
        *(f"model.vision.head_width={_HEAD_WIDTH}", f"model.text.heads={width // _HEAD_WIDTH}"),
        *(
            f"output_dir={output / 'runs'}",
            f"name={attention}_width{width}_steps{steps}_seed{seed}",
        ),
        *(f"train.steps={steps}", f"train.seed={seed}", "train.global_batch_size=64"),
        *("data.num_workers=0", "log.every_steps=1", "log.tensorboard=false", "log.num_images=0"),
        *("eval.every_steps=0", "checkpoint.every_steps=0"),
    ]


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

"""Convergence study: forms or kinds of attention, several seeds and lengths, one table.

``python -m experiments.convergence OUTPUT_FOLDER`` trains on the embedded dataset, one process per
core, and writes runs.jsonl, table.md and figure.png into OUTPUT_FOLDER, and the common settings
into config.yaml. Runs already in runs.jsonl are not repeated, so an interrupted study continues
where it stopped; other settings need another folder.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.attention.zoo import SLOW, ZOO, overrides_of
from ds_linclip.config import Config, load_config, save_config
from ds_linclip.model.flops import num_parameters
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.atomic import atomic_file, write_atomically
from ds_linclip.process.progress import progress
from ds_linclip.trainer import train
from experiments.convergence_report import (
    ConvergenceRun,
    compare,
    draw,
    read_runs,
    summarise,
    to_markdown,
)
from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator

#: Overrides of the forms of the paper, by their names.
FORMS: dict[str, list[str]] = {
    "softmax": overrides_of("softmax"),
    "Eq. 4": overrides_of("eq4"),
    "Eq. 7, alpha 0": overrides_of("eq7"),
    **{
        f"Eq. 7, {name}": [f"model.{tower}.attention.{setting}" for tower in ("vision", "text")]
        for name, setting in (
            ("alpha 1/2", "length_exponent=0.5"),
            ("alpha 1", "length_exponent=1"),
            ("head norm", "head_norm=true"),
        )
    },
}
#: Variants by the names of the design, and what each is compared with, seed by seed.
DESIGNS = {
    "forms": (FORMS, ("softmax", "Eq. 7, alpha 0")),
    "kinds": ({name: overrides_of(name) for name in ZOO if name not in SLOW}, ("softmax", "eq7")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="ds_configs/train/embedded.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[32, 56])
    parser.add_argument("--design", choices=DESIGNS, default="forms")
    parser.add_argument("--variants", nargs="+", help="those of the design; default: all")
    parser.add_argument("overrides", nargs="*", help="dotted assignments for every run")
    arguments = parser.parse_intermixed_args()
    log = arguments.output / "runs.jsonl"
    variants, baselines = DESIGNS[arguments.design]
    chosen = arguments.variants or list(variants)
    try:
        if unknown := [name for name in chosen if name not in variants]:
            raise ValueError(f"variants ({unknown[0]}) must be of {', '.join(variants)}")
        _keep_settings(arguments.output, load_config(arguments.config, arguments.overrides))
        done = read_runs(log) if log.exists() else []
        if strange := [run.variant for run in done if run.variant not in variants]:
            raise ValueError(
                f"output ({arguments.output}) must be another folder: {log} has runs of another "
                f"design ({strange[0]})"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finished = {(run.variant, run.num_tokens, run.seed) for run in done}
    configs = []
    plan = product(arguments.image_sizes, range(arguments.seeds), chosen)
    for image_size, seed, variant in plan:
        overrides = [
            *variants[variant],
            *_overrides(arguments.output, variant, image_size, seed),
            *arguments.overrides,
        ]
        config = load_config(arguments.config, overrides)
        if (variant, config.model.vision.num_tokens, seed) not in finished:
            configs.append((variant, config))
    for run in train_all(configs, os.cpu_count() or 1):
        done.append(run)
        with log.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
    done.sort(key=lambda run: (list(variants).index(run.variant), run.num_tokens, run.seed))
    tables = [to_markdown(summarise(done))]
    for baseline in baselines:
        tables += [compare(done, baseline, "top1", 1), compare(done, baseline, "loss", 3)]
    table = "\n".join(tables)
    write_atomically(arguments.output / "table.md", table)
    with atomic_file(arguments.output / "figure.png") as partial:
        draw(done, baselines[0]).savefig(partial, format="png")
    print(table)
    return 0


def train_all(configs: Sequence[tuple[str, Config]], processes: int) -> Iterator[ConvergenceRun]:
    """Train and score runs, one core each; yield each when it is finished.

    Args:
        configs: The variant and the configuration of every run.
        processes: Number of runs at a time.
    """
    os.environ["TQDM_DISABLE"] = "1"  # in the runs: tqdm reads it when a process imports it
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run_one, *each) for each in configs]
        for future in progress(as_completed(futures), total=len(futures), desc="runs", unit="run"):
            yield future.result()


def _run_one(variant: str, config: Config) -> ConvergenceRun:
    torch.set_num_threads(1)
    mesh = Mesh.create(config.parallel)
    evaluator = HeldOutEvaluator.from_config(config, device=mesh.device)
    # Remove what an interrupted study left of this run.
    shutil.rmtree(config.run_dir, ignore_errors=True)
    start = time.monotonic()
    result = train(config, mesh, evaluator)
    return ConvergenceRun(
        variant=variant,
        seed=config.train.seed,
        num_tokens=config.model.vision.num_tokens,
        top1=result.evaluation["eval/zeroshot_top1"],
        top5=result.evaluation["eval/zeroshot_top5"],
        loss=_final_loss(config),
        num_parameters=num_parameters(config.model, config.loss),
        seconds=time.monotonic() - start,
    )


def _keep_settings(output: Path, common: Config) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "config.yaml"
    if not path.exists():
        save_config(common, path)
    elif load_config(path) != common:
        raise ValueError(f"output ({output}) must be another folder: {path} has other settings")


def _overrides(output: Path, variant: str, image_size: int, seed: int) -> list[str]:
    slug = "".join(c if c.isalnum() else "_" for c in variant)
    return [
        f"output_dir={output / 'runs'}",
        f"name={slug}_{image_size}px_seed{seed}",
        f"train.seed={seed}",
        f"model.vision.image_size={image_size}",
        *("data.num_workers=0", "log.tensorboard=false", "log.num_images=0"),
        *("eval.every_steps=0", "checkpoint.every_steps=1000000"),
    ]


def _final_loss(config: Config) -> float:
    """Return the mean loss of the last tenth of the logged steps: one batch is too noisy."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    last = [r["train/loss"] for r in records if r["step"] > 0.9 * config.train.steps]
    return statistics.fmean(last)


if __name__ == "__main__":
    sys.exit(main())

"""The one training loop."""

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ds_linclip.checkpoint import CheckpointStore, weights_folder
from ds_linclip.config import Config, InitConfig, save_config
from ds_linclip.data import Batch, DataReport, Storage, TrainData, find_shards
from ds_linclip.feed import feed
from ds_linclip.metrics import MetricWriter, SampleLog, StepMeter
from ds_linclip.model import CLIP
from ds_linclip.model.patch_dropout import kept_patches
from ds_linclip.model.pretrained import load_pretrained, lock_towers
from ds_linclip.optim import build_optimizer, ema_decay, learning_rate
from ds_linclip.parallel.deepspeed_config import check_machine, deepspeed_config
from ds_linclip.parallel.engine import Engine, initialize_engine
from ds_linclip.parallel.mesh import AgreedError, Mesh
from ds_linclip.parallel.plan import describe, plan_rank
from ds_linclip.parallel.stages import stage_units
from ds_linclip.progress import Progress

__all__ = ["Evaluator", "TrainResult", "train"]

logger = logging.getLogger(__name__)

#: Scores the model after a number of steps; called by all ranks, in eval mode, without gradients.
#: A ValueError it raises, it raises on all of them.
Evaluator = Callable[[CLIP, MetricWriter, int], Mapping[str, float]]


@dataclass(kw_only=True)
class TrainResult:
    """Figures of a finished run."""

    steps: int
    #: Values of the last logging step; empty when the run was already finished.
    last: Mapping[str, float] = field(default_factory=dict)
    #: Values of the last evaluation; empty without an evaluator.
    evaluation: Mapping[str, float] = field(default_factory=dict)


def train(
    config: Config,
    mesh: Mesh,
    evaluate: Evaluator | None = None,
    phases: Progress | None = None,
) -> TrainResult:
    """Train as ``config`` says, going on from the run folder's newest checkpoint if there is one.

    Args:
        config, mesh: Of the run.
        evaluate: Scores the model every ``eval.every_steps`` and after the last step.
        phases: Told of every phase, for a watchdog to look at.

    Raises:
        AgreedError: on all ranks together, before the first step, for whatever in the config does
            not fit the data, the ranks or the run folder; later, for held-out data that cannot be
            scored.
        DataError: on the rank that finds no usable training sample.
    """
    data = _open_data(config, mesh)
    report = DataReport(config.data.max_bad_samples)
    mesh.agree(lambda: check_machine(config))
    mesh.agree(lambda: deepspeed_config(config, mesh))
    checkpoints = CheckpointStore(config, mesh, data.identity)
    resume_from = checkpoints.newest()
    mesh.agree(lambda: _prepare_run_folder(config, mesh))
    phases = phases or Progress()
    phases.enter("building the model")

    changed = resume_from is not None and checkpoints.is_from_other_ranks(resume_from)
    weights = config.init if resume_from is None else InitConfig()
    if resume_from and changed:  # what DeepSpeed converts for other ranks lacks all that is locked
        weights = InitConfig(pretrained=str(weights_folder(resume_from)))
    model = _build_model(config, mesh, weights)
    plan = describe(config, mesh, plan_rank(config, mesh, model))
    optimizer = build_optimizer(model, config.optim)
    engine = initialize_engine(model, optimizer, config, mesh, load_universal=changed)
    start = 0
    if resume_from:
        phases.enter("loading a checkpoint")
        start, state = checkpoints.load(engine, resume_from)
        report.load_state(state)
    writer = MetricWriter(config, mesh, engine.monitor)
    if mesh.rank == 0:
        logger.info("%s\n%s", f"resumed from {resume_from}" if start else "from step 0", plan)
    writer.text(start, "parallel_plan", plan)
    sample_log = SampleLog(config, mesh, start)
    meter = StepMeter(mesh, config.watchdog.slow_rank_ratio)
    engine.on_features += [
        meter.features_ready,
        partial(phases.enter, "computing loss and gradients"),
    ]
    result = TrainResult(steps=config.train.steps)
    steps = config.train.steps
    batches = feed(data, config, mesh, start)
    progress = _progress_bar(config, mesh, start)
    model.train()
    for step in range(start + 1, steps + 1):
        phases.enter("waiting for data", step)
        asked = time.perf_counter()
        batch = next(batches)
        meter.waited(time.perf_counter() - asked)
        report.add(batch)
        phases.enter("computing features")

        rate = learning_rate(step - 1, steps, config.optim)
        decay = ema_decay(step - 1, config.optim.ema_decay)
        loss = engine.step(_inputs(batch, config, mesh, step), lr=rate, ema_decay=decay)
        sample_log.write(step, batch.keys)
        num_tokens = model.num_tokens(batch.images, batch.texts)
        meter.step_done(samples=len(batch.texts), tokens=num_tokens)
        progress.update()

        is_logged = _is_due(step, config.log.every_steps, steps)
        is_saved = _is_due(step, config.checkpoint.every_steps, steps)
        if is_logged or is_saved:
            phases.enter("logging")
            data_counts = _share_report(report, config, mesh, step)
        if is_logged:
            values = meter.read(loss) | data_counts
            values |= _optimizer_values(engine, rate)
            writer.scalars(step, values)
            _show(progress, values)
            result.last = values
            meter.restart()
        if is_saved:
            phases.enter("saving")
            checkpoints.save(engine, step, report.state())
            meter.restart()
        if evaluate and _is_due(step, config.eval.every_steps, steps):
            phases.enter("evaluating")
            result.evaluation = _evaluate(evaluate, engine, writer, step)
            meter.restart()
    progress.close()
    if evaluate and start == steps:  # a finished run is scored again
        phases.enter("evaluating")
        result.evaluation = _evaluate(evaluate, engine, writer, steps)
    return result


def _build_model(config: Config, mesh: Mesh, weights: InitConfig) -> CLIP:
    """This rank's part of the model, from the seed or from trained weights."""
    torch.manual_seed(config.train.seed)
    model = CLIP(config.model, mesh, loss=config.loss.kind, units=stage_units(config, mesh.pp))
    mesh.agree(lambda: load_pretrained(model, weights))
    lock_towers(model, config.init)
    model.recompute_activations(config.train.activation_checkpointing)
    if config.train.compile:
        model.compile_blocks()
    return model


def _is_due(step: int, every: int, steps: int) -> bool:
    """Whether to do what is done every so many steps (0: never) and after the last one."""
    return step == steps or (every > 0 and step % every == 0)


def _inputs(batch: Batch, config: Config, mesh: Mesh, step: int) -> tuple[Tensor, ...]:
    """Arguments of the model: images, texts and, with patch dropout, the patches to look at."""
    vision = config.model.vision
    if vision.patch_dropout == 0 or mesh.pp.rank > 0:
        return batch.images, batch.texts
    height, width = batch.images.shape[2:]
    first = (step - 1) * config.train.global_batch_size + mesh.dp.rank * len(batch.images)
    kept = kept_patches(
        torch.arange(first, first + len(batch.images), device=mesh.device),
        num_patches=vision.num_tokens_at((height, width)) - 1,
        num_kept=vision.num_kept_patches_at((height, width)),
        seed=config.train.seed,
    )
    return batch.images, batch.texts, kept


def _evaluate(
    evaluate: Evaluator, engine: Engine, writer: MetricWriter, step: int
) -> Mapping[str, float]:
    try:
        with engine.evaluation_model() as model:
            values = evaluate(model, writer, step)
    except ValueError as error:
        raise AgreedError(str(error)) from error
    writer.scalars(step, values)
    return values


def _optimizer_values(engine: Engine, rate: float) -> dict[str, float]:
    return {
        "train/lr": rate,
        "train/logit_scale": engine.objective.logit_scale.item(),
        "train/grad_norm": engine.grad_norm,
        "train/skipped_steps": engine.skipped_steps,
    }


def _progress_bar(config: Config, mesh: Mesh, start: int) -> tqdm:
    """On rank 0; in a log file a line every half minute is enough."""
    bar = tqdm if mesh.rank == 0 else partial(tqdm, disable=True)
    return bar(
        desc="train",
        unit="step",
        total=config.train.steps,
        initial=start,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )


def _show(progress: tqdm, values: Mapping[str, float]) -> None:
    progress.set_postfix(
        {
            "loss": f"{values['train/loss']:.3f}",
            "samples/s": f"{values['perf/samples_per_second']:.0f}",
        },
        refresh=False,
    )


def _open_data(config: Config, mesh: Mesh) -> TrainData:
    """Rank 0 looks for the shards: tens of thousands of small files are not read by every rank."""
    groups = mesh.from_rank_zero(
        lambda: find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    )
    return mesh.agree(lambda: TrainData(config, groups, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size))


def _share_report(report: DataReport, config: Config, mesh: Mesh, step: int) -> dict[str, float]:
    """Add up what the ranks have met in their data, write it down, judge it."""
    report.merge(mesh.gather(report.take()))
    if mesh.rank == 0:
        report.write(config.run_dir / "data_report.json", step=step)
    mesh.agree(report.check)
    return report.scalars()


def _prepare_run_folder(config: Config, mesh: Mesh) -> None:
    """Make the folder and write down what this run is: config, DeepSpeed's dictionary, versions."""
    if mesh.rank != 0:
        return
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, config.run_dir / "config.yaml")
        provenance = {
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "device": str(mesh.device),
            "world_size": mesh.world_size,
            **{name: version(name) for name in ("torch", "triton", "deepspeed", "megatron-core")},
        }
        (config.run_dir / "versions.json").write_text(json.dumps(provenance, indent=1))
        generated = deepspeed_config(config, mesh)
        (config.run_dir / "deepspeed.json").write_text(json.dumps(generated, indent=1))
    except OSError as error:
        raise ValueError(f"output_dir ({config.output_dir}) cannot be written: {error}") from error


def _git_commit() -> str | None:
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()

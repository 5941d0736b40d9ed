"""The one training loop."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ds_linclip.checkpoint import CheckpointStore
from ds_linclip.config import Config, InitConfig
from ds_linclip.data import Batch, DataReport, Storage, TrainData, find_shards
from ds_linclip.feed import feed
from ds_linclip.health import Diverged, Health
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
from ds_linclip.requests import Exchange, Preempted, Requests, Signals
from ds_linclip.run_folder import RunFolder

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


def train(config: Config, mesh: Mesh, evaluate: Evaluator | None = None) -> TrainResult:
    """Train as ``config`` says, going on from the run folder's newest checkpoint if there is one.

    Raises:
        AgreedError: on all ranks together, before the first step, for whatever in the config does
            not fit the data, the ranks or the run folder; later, for held-out data that cannot be
            scored.
        Preempted: on all ranks together, when one got SIGTERM and the step is saved.
        DataError: on the rank that finds no usable training sample.
        Diverged: on all ranks together, when training cannot go on as it is.
    """
    with Signals().caught() as signals:
        data = _open_data(config, mesh)
        mesh.agree(lambda: check_machine(config))
        mesh.agree(lambda: deepspeed_config(config, mesh))
        with RunFolder.hold(config, mesh) as folder:
            return _train(config, mesh, data, folder, signals, evaluate)


def _train(
    config: Config,
    mesh: Mesh,
    data: TrainData,
    folder: RunFolder,
    signals: Signals,
    evaluate: Evaluator | None,
) -> TrainResult:
    report = DataReport(config.data.max_bad_samples)
    checkpoints = CheckpointStore(config, mesh, data.identity)
    health = Health(config, mesh, checkpoints)
    resume_from = checkpoints.newest()
    folder.record_start(resume_from)
    checkpoints.remove_leftovers()

    model = _build_model(config, mesh, config.init if resume_from is None else InitConfig())
    plan = describe(config, mesh, plan_rank(config, mesh, model))
    optimizer = build_optimizer(model, config.optim)
    engine = initialize_engine(model, optimizer, config, mesh)
    start = 0
    if resume_from:
        start, state = checkpoints.load(engine, resume_from)
        report.load_state(state)
        health.load_state(state["health"])
    writer = MetricWriter(config, mesh, engine.monitor)
    writer.cut_back(start)
    if mesh.rank == 0:
        logger.info("%s\n%s", f"resumed from {resume_from}" if start else "from step 0", plan)
    writer.text(start, "parallel_plan", plan)
    sample_log = SampleLog(config, mesh, start, health.skipped_batches)
    meter = StepMeter(mesh)
    exchange = Exchange(mesh)
    result = TrainResult(steps=config.train.steps)
    steps = config.train.steps
    batches = feed(data, config, mesh, start, health.skipped_batches)
    progress = _progress_bar(config, mesh, start)
    model.train()
    step = start
    while step < steps:
        step += 1
        begun = time.perf_counter()
        batch = next(batches)
        meter.waited(time.perf_counter() - begun)
        report.add(batch)

        rate = learning_rate(step - 1, steps, config.optim)
        decay = ema_decay(step - 1, config.optim.ema_decay)
        inputs = _inputs(batch, config, mesh, step - 1 + health.skipped_batches)
        loss = engine.step(inputs, lr=rate, ema_decay=decay)
        sample_log.write(step, batch.keys)
        num_tokens = model.num_tokens(batch.images, batch.texts)
        meter.step_done(samples=len(batch.texts), tokens=num_tokens)
        progress.update()
        health.step_done(
            step, loss, was_skipped=engine.was_skipped, is_excused=engine.can_lower_loss_scale
        )

        save, leave = signals.take()
        save |= checkpoints.is_due_by_clock()
        asked = exchange(Requests(save=save, leave=leave, has_failed=checkpoints.has_failed))
        if asked.has_failed:
            checkpoints.wait()  # raises
        is_logged = _is_due(step, config.log.every_steps, steps)
        # Weights that stay as they are need no further checkpoint, which would push out others.
        is_saved = _is_due(step, 0 if health.is_skipping else config.checkpoint.every_steps, steps)
        is_saved |= asked.save or asked.leave
        if is_logged or is_saved:
            data_counts = _share_report(report, config, mesh, step)
        if is_logged:
            values = meter.read(loss) | data_counts
            values |= _optimizer_values(engine, rate) | health.scalars()
            writer.scalars(step, values)
            _show(progress, values)
            result.last = values
            meter.restart()
            health.check_loss(step, values["train/loss"])
            if health.is_spike(step, values["train/loss"]):
                step = _rewind(checkpoints, engine, health, step)
                batches = feed(data, config, mesh, step, health.skipped_batches)
                sample_log = SampleLog(config, mesh, step, health.skipped_batches)
                writer.cut_back(step)
                progress.update(step - progress.n)
                meter.restart()
                continue
        if is_saved:
            checkpoints.save(engine, step, report.state() | {"health": health.state()})
            meter.restart()
        if asked.leave and step < steps:
            checkpoints.wait()
            raise Preempted(f"asked to leave: {checkpoints.last} is saved")
        if evaluate and _is_due(step, config.eval.every_steps, steps):
            result.evaluation = _evaluate(evaluate, engine, writer, step)
            meter.restart()
    progress.close()
    exchange.close()
    checkpoints.wait()
    if evaluate and start == steps:  # a finished run is scored again
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


def _rewind(checkpoints: CheckpointStore, engine: Engine, health: Health, step: int) -> int:
    """Load the newest checkpoint, to go on from it without the batches since; returns its step."""
    path = checkpoints.newest()
    if path is None:
        raise Diverged(
            f"the loss jumped at step {step}, before there is a checkpoint to go back to"
        )
    to_step, _ = checkpoints.load(engine, path)
    health.rewound(step, to_step)
    return to_step


def _inputs(batch: Batch, config: Config, mesh: Mesh, number: int) -> tuple[Tensor, ...]:
    """Arguments of the model: images, texts and, with patch dropout, the patches to look at.

    ``number`` is that of the global batch in the order of the data.
    """
    vision = config.model.vision
    if vision.patch_dropout == 0 or mesh.pp.rank > 0:
        return batch.images, batch.texts
    height, width = batch.images.shape[2:]
    first = number * config.train.global_batch_size + mesh.dp.rank * len(batch.images)
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

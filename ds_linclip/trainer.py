"""The one training loop."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ds_linclip.checkpoint import CheckpointStore
from ds_linclip.config import Config, InitConfig
from ds_linclip.data import Batch, DataReport, Storage, TrainData, find_shards
from ds_linclip.data.broadcast import feed
from ds_linclip.engine.deepspeed_config import check_machine, deepspeed_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer, ema_decay, learning_rate
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.model import CLIP
from ds_linclip.model.freeze import lock_towers
from ds_linclip.model.patch_dropout import kept_patches
from ds_linclip.monitoring import open_listeners
from ds_linclip.monitoring.metrics import MetricWriter, SampleLog, StepMeter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import describe, plan_rank
from ds_linclip.process.consensus import AgreedError
from ds_linclip.process.phase import Progress
from ds_linclip.resilience.divergence import Diverged, Health
from ds_linclip.resilience.preemption import Exchange, Preempted, Requests, Signals
from ds_linclip.run_dir import RunFolder

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
            scored and checkpoints that cannot be saved.
        Preempted: on all ranks together, when one got SIGTERM and the step is saved.
        DataError: on the rank that finds no usable training sample.
        Diverged: on all ranks together, when training cannot go on as it is.
    """
    with ExitStack() as leaving:
        run = _Run(config, mesh, phases or Progress(), leaving)
        was_finished = run.step == config.train.steps
        while run.step < config.train.steps:
            batch = run.next_batch()
            loss = run.take_step(batch)
            asked = run.hear_requests()
            is_logged = run.is_due(config.log.every_steps)
            is_saved = run.is_due(run.steps_between_saves) or asked.save or asked.leave
            if is_logged or is_saved:
                run.count_samples()
            if is_logged and run.log(loss):
                run.rewind()
                continue
            if is_saved:
                run.save()
            if asked.leave and run.step < config.train.steps:
                run.leave()
            if evaluate and run.is_due(config.eval.every_steps):
                run.evaluate(evaluate)
        run.finish()
        if evaluate and was_finished:  # scored again
            run.evaluate(evaluate)
        return run.result


class _Run:
    """What the loop works with, and what it does with it; every method is for all ranks together.

    Args:
        config, mesh, phases: as in :func:`train`.
        leaving: Undoes what outlives the run otherwise.

    Attributes:
        step: Optimizer steps done.
        result: Figures so far.
    """

    def __init__(self, config: Config, mesh: Mesh, phases: Progress, leaving: ExitStack) -> None:
        self._config, self._mesh, self._phases = config, mesh, phases
        self._signals = leaving.enter_context(Signals().caught())
        self._data = _open_data(config, mesh)
        mesh.agree(lambda: check_machine(config))
        mesh.agree(lambda: deepspeed_config(config, mesh))
        folder = leaving.enter_context(RunFolder.hold(config, mesh))
        listeners = leaving.enter_context(open_listeners(config, mesh, phases))
        phases.enter("building the model")
        self._checkpoints = CheckpointStore(config, mesh, self._data.identity)
        leaving.callback(self._checkpoints.close)
        resume_from = self._checkpoints.newest()
        folder.record_start(resume_from)
        self._checkpoints.remove_leftovers()

        self._model = _build_model(config, mesh, InitConfig() if resume_from else config.init)
        plan = describe(config, mesh, mesh.gather_all(plan_rank(config, mesh)))
        optimizer = build_optimizer(self._model, config.optim)
        self._engine = initialize_engine(self._model, optimizer, config, mesh)
        self._report = DataReport(config.data.max_bad_samples)
        self._health = Health(config, mesh, self._checkpoints)
        self.step = 0
        if resume_from:
            phases.enter("loading a checkpoint")
            self.step, state = self._checkpoints.load(self._engine, resume_from)
            self._report.load_state(state)
            self._health.load_state(state["health"])
        self._writer = MetricWriter(config, mesh, self._engine.monitor, listeners)
        if mesh.rank == 0:
            logger.info(
                "%s\n%s", f"resumed from {resume_from}" if self.step else "from step 0", plan
            )
        self._writer.begin(self.step, plan)
        self._exchange = Exchange(mesh)
        self._meter = StepMeter(config, mesh)
        self._engine.on_features += [
            self._meter.features_ready,
            partial(phases.enter, "computing loss and gradients"),
        ]
        self._bar = leaving.enter_context(_progress_bar(config, mesh, self.step))
        self.result = TrainResult(steps=config.train.steps)
        self._start_from_here()
        self._model.train()

    def _start_from_here(self) -> None:
        """Forget what came after ``step``; open the data there."""
        skipped = self._health.skipped_batches
        self._batches = feed(self._data, self._config, self._mesh, self.step, skipped)
        self._sample_log = SampleLog(self._config, self._mesh, self.step, skipped)
        self._writer.cut_back(self.step)
        self._bar.update(self.step - self._bar.n)
        self._meter.restart()

    def is_due(self, every: int) -> bool:
        """Whether to do what is done every so many steps (0: never) and after the last one."""
        return self.step == self._config.train.steps or (every > 0 and self.step % every == 0)

    @property
    def steps_between_saves(self) -> int:
        """None while weights stay as they are: copies of them would push out older ones."""
        return 0 if self._health.is_skipping else self._config.checkpoint.every_steps

    def next_batch(self) -> Batch:
        """Begin a step: this rank's part of its global batch."""
        self.step += 1
        self._phases.enter("waiting for data", self.step)
        begun = time.perf_counter()
        batch = next(self._batches)
        self._meter.waited(time.perf_counter() - begun)
        self._report.add(batch)
        return batch

    def take_step(self, batch: Batch) -> Tensor:
        """Forward, backward, optimizer: the loss [] of this rank's rows."""
        self._phases.enter("computing features")
        config, before = self._config, self.step - 1
        rate = learning_rate(before, config.train.steps, config.optim)
        decay = ema_decay(before, config.optim.ema_decay)
        inputs = _inputs(batch, config, self._mesh, before + self._health.skipped_batches)
        loss = self._engine.step(inputs, lr=rate, ema_decay=decay)
        self._sample_log.write(self.step, batch.keys)
        num_tokens = self._model.num_tokens(batch.images, batch.texts)
        self._meter.step_done(self.step, samples=len(batch.texts), tokens=num_tokens)
        self._bar.update()
        self._health.step_done(
            self.step,
            loss,
            was_skipped=self._engine.was_skipped,
            is_excused=self._engine.can_lower_loss_scale,
        )
        return loss

    def hear_requests(self) -> Requests:
        """What any rank was asked to do; a save that failed ends the run here."""
        save, leave = self._signals.take()
        save |= not self._health.is_skipping and self._checkpoints.is_due_by_clock()
        failed = self._checkpoints.has_failed
        asked = self._exchange(Requests(save=save, leave=leave, has_failed=failed))
        if asked.has_failed:
            self._checkpoints.wait()
            raise AgreedError(f"another rank takes {self._checkpoints.last} for not saved")
        return asked

    def count_samples(self) -> None:
        """Add up what the ranks have met in their data, write it down, judge it."""
        self._phases.enter("logging")
        report = self._report
        report.merge(self._mesh.gather(report.take()))
        if self._mesh.rank == 0:
            report.write(self._config.run_dir / "data_report.json", step=self.step)
        self._mesh.agree(report.check)

    def log(self, loss: Tensor) -> bool:
        """Write the scalars of the step; whether its loss has jumped."""
        engine = self._engine
        rate = learning_rate(self.step - 1, self._config.train.steps, self._config.optim)
        values = self._meter.read(loss) | self._report.scalars() | self._health.scalars()
        values |= {
            "train/lr": rate,
            "train/logit_scale": engine.objective.logit_scale.item(),
            "train/grad_norm": engine.grad_norm,
            "train/skipped_steps": engine.skipped_steps,
        }
        self._writer.scalars(self.step, values)
        _show(self._bar, values)
        self.result.last = values
        self._meter.restart()
        self._health.check_loss(self.step, values["train/loss"])
        return self._health.is_spike(self.step, values["train/loss"])

    def rewind(self) -> None:
        """Go back to the newest checkpoint, and on from it without the batches since."""
        self._phases.enter("loading a checkpoint")
        path = self._checkpoints.newest()
        if path is None:
            raise Diverged(
                f"the loss jumped at step {self.step}, before there is a checkpoint to go back to"
            )
        to_step, _ = self._checkpoints.load(self._engine, path)
        self._health.rewound(self.step, to_step)
        self.step = to_step
        self._start_from_here()

    def save(self) -> None:
        """Begin to save what the run needs to go on from here."""
        self._phases.enter("saving")
        state = self._report.state() | {"health": self._health.state()}
        self._checkpoints.save(self._engine, self.step, state)
        self._meter.restart()

    def leave(self) -> None:
        """End before the last step, as asked."""
        self._checkpoints.wait()
        raise Preempted(f"asked to leave: {self._checkpoints.last} is saved")

    def evaluate(self, evaluate: Evaluator) -> None:
        """Score the model as it is."""
        self._phases.enter("evaluating")
        try:
            with self._engine.evaluation_model() as model:
                self.result.evaluation = evaluate(model, self._writer, self.step)
        except ValueError as error:
            raise AgreedError(str(error)) from error
        self._writer.scalars(self.step, self.result.evaluation)
        self._meter.restart()

    def finish(self) -> None:
        """Nothing is under way any more."""
        self._phases.enter("saving")
        self._exchange.close()
        self._checkpoints.wait()
        self._writer.end()


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

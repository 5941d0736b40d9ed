"""The one training loop."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config, InitConfig
from ds_linclip.data import Batch, DataReport, Storage, TrainData, find_shards
from ds_linclip.data.broadcast import broadcast_batches
from ds_linclip.engine.deepspeed_config import check_machine, deepspeed_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer, ema_decay, learning_rate
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.model import CLIP
from ds_linclip.model.freeze import lock_towers
from ds_linclip.model.patch_dropout import kept_patches
from ds_linclip.monitoring.metrics import MetricWriter, SampleLog, StepMeter
from ds_linclip.monitoring.sinks import open_sinks
from ds_linclip.number_text import format_figure
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import describe, plan_rank
from ds_linclip.process.consensus import AgreedError
from ds_linclip.process.phase import PhaseTracker
from ds_linclip.process.progress import progress
from ds_linclip.resilience.divergence import Diverged, DivergenceGuard
from ds_linclip.resilience.preemption import (
    Preempted,
    PreemptionSignals,
    RequestReducer,
    RunRequests,
)
from ds_linclip.run_dir import RunFolder

__all__ = ["Evaluator", "TrainResult", "Trainer", "train"]

logger = logging.getLogger(__name__)

#: Scores the model after a number of steps; called by all ranks, in eval mode, without gradients.
#: A ValueError that it raises must be raised on all ranks.
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
    phases: PhaseTracker | None = None,
) -> TrainResult:
    """Train a model, resuming from the run folder's newest checkpoint if there is one.

    Args:
        config: The run's configuration.
        mesh: The ranks that train together; all of them call this function.
        evaluate: Scores the model every ``eval.every_steps`` and after the last step.
        phases: Records what this rank is doing, for a watchdog to read.

    Returns:
        The figures of the last logged step and the last evaluation.

    Raises:
        AgreedError: on all ranks together, before the first step, for anything in the config that
            does not fit the data, the ranks or the run folder; later, for held-out data that cannot
            be scored and checkpoints that cannot be saved.
        Preempted: on all ranks together, when one received SIGTERM and the step is saved.
        DataError: on the rank that finds no usable training sample.
        Diverged: on all ranks together, when training cannot continue.
    """
    with ExitStack() as resources:
        return Trainer(config, mesh, evaluate, phases or PhaseTracker(), resources).run()


class Trainer:
    """A run: built by the constructor, carried out by :meth:`run`.

    All ranks call every method together. How a step is computed: docs/training_step.md. Arguments
    are those of :func:`train`; ``resources`` closes, when it is closed, what the run has opened.

    Attributes:
        step: Number of optimizer steps done.
        result: Figures so far.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        evaluate: Evaluator | None,
        phases: PhaseTracker,
        resources: ExitStack,
    ) -> None:
        self._config, self._mesh, self._evaluator, self._phases = config, mesh, evaluate, phases
        self._signals = resources.enter_context(PreemptionSignals().caught())
        self._data = _open_data(config, mesh)
        mesh.agree(lambda: check_machine(config))
        mesh.agree(lambda: deepspeed_config(config, mesh))
        folder = resources.enter_context(RunFolder.hold(config, mesh))
        listeners = resources.enter_context(open_sinks(config, mesh, phases))
        phases.enter("building the model")
        self._checkpoints = CheckpointManager(config, mesh, self._data.identity)
        resources.callback(self._checkpoints.close)
        resume_from = self._checkpoints.newest()
        folder.record_start(resume_from)
        self._checkpoints.remove_leftovers()

        self._model = _build_model(config, mesh, InitConfig() if resume_from else config.init)
        plan = describe(config, mesh, mesh.gather_all(plan_rank(config, mesh)))
        optimizer = build_optimizer(self._model, config.optim)
        self._engine = initialize_engine(self._model, optimizer, config, mesh)
        self._report = DataReport(config.data.max_bad_samples)
        self._divergence = DivergenceGuard(config, mesh, self._checkpoints)
        self.step = 0
        if resume_from:
            phases.enter("loading a checkpoint")
            self.step, state = self._checkpoints.load(self._engine, resume_from)
            self._report.load_state(state)
            self._divergence.load_state(state["health"])
        self._writer = MetricWriter(config, mesh, self._engine.monitor, listeners)
        if mesh.rank == 0:
            start = f"resumed from {resume_from}" if self.step else "from step 0"
            logger.info("%s\n%s", start, plan)
        self._writer.begin(self.step, plan)
        self._request_reducer = RequestReducer(mesh)
        self._save_requested = False
        self._meter = StepMeter(config, mesh)
        self._engine.on_features += [
            self._meter.features_ready,
            partial(phases.enter, "computing loss and gradients"),
        ]
        total, is_hidden = config.train.steps, mesh.rank > 0
        bar = progress(desc="train", unit="step", total=total, initial=self.step, disable=is_hidden)
        self._bar = resources.enter_context(bar)
        self.result = TrainResult(steps=config.train.steps)
        self._open_batches()
        self._model.train()

    def run(self) -> TrainResult:
        """Take the steps that are left; log, save and evaluate when it is due."""
        config = self._config
        was_finished = self.step == config.train.steps
        while self.step < config.train.steps:
            loss = self.train_step()
            is_leaving = self._receive_requests().leave
            is_logged = self._is_due(config.log.every_steps)
            is_saved = self._is_save_due() or is_leaving
            if is_logged or is_saved:
                self._count_samples()
            if is_logged:
                logged = self._log(loss)["train/loss"]
                self._divergence.check_loss(self.step, logged)
                if self._divergence.is_spike(self.step, logged):
                    self._rewind()
                    continue  # a requested save is made after the next step
            if is_saved:
                self._save()
            if is_leaving and self.step < config.train.steps:
                self._checkpoints.wait()
                raise Preempted(f"asked to leave: {self._checkpoints.last} is saved")
            if self._is_due(config.eval.every_steps):
                self._evaluate()
        self._finish()
        if was_finished:
            self._evaluate()
        return self.result

    def train_step(self) -> Tensor:
        """Take one optimizer step on the next global batch.

        Returns:
            The loss [] of this rank's rows, on the device.
        """
        config, done = self._config, self.step
        self._phases.enter("waiting for data", done + 1)
        started = time.perf_counter()
        batch = next(self._batches)
        self._meter.waited(time.perf_counter() - started)
        self._report.add(batch)

        self._phases.enter("computing features")
        inputs = _model_inputs(batch, config, self._mesh, done + self._divergence.skipped_batches)
        loss = self._engine.step(
            inputs,
            lr=learning_rate(done, config.train.steps, config.optim),
            ema_decay=ema_decay(done, config.optim.ema_decay),
        )
        self.step += 1

        self._sample_log.write(self.step, batch.keys)
        num_tokens = self._model.num_tokens(batch.images, batch.texts)
        self._meter.step_done(self.step, samples=len(batch.texts), tokens=num_tokens)
        self._bar.update()
        self._divergence.step_done(
            self.step,
            loss,
            was_skipped=self._engine.was_skipped,
            is_excused=self._engine.can_lower_loss_scale,
        )
        return loss

    def _is_due(self, every: int) -> bool:
        """Whether to do now what is done every so many steps (0: never) and after the last one."""
        return self.step == self._config.train.steps or (every > 0 and self.step % every == 0)

    def _is_save_due(self) -> bool:
        """Whether to save after this step.

        Not on schedule while steps are skipped: copies of the same weights would replace older
        ones.
        """
        every = 0 if self._divergence.is_skipping else self._config.checkpoint.every_steps
        return self._save_requested or self._is_due(every)

    def _receive_requests(self) -> RunRequests:
        """Share with all ranks what this one was asked to do; return what any rank was asked.

        Raises:
            AgreedError: when a save has failed on any rank.
        """
        save, leave = self._signals.take()
        save |= not self._divergence.is_skipping and self._checkpoints.is_due_by_clock()
        mine = RunRequests(save=save, leave=leave, has_failed=self._checkpoints.has_failed)
        requests = self._request_reducer.reduce(mine)
        if requests.has_failed:
            self._checkpoints.wait()
            raise AgreedError(f"another rank takes {self._checkpoints.last} for not saved")
        self._save_requested |= requests.save
        return requests

    def _count_samples(self) -> None:
        """Sum over ranks the samples and faults met in the data; write and check the sums."""
        self._phases.enter("logging")
        report = self._report
        report.merge(self._mesh.gather(report.take()))
        if self._mesh.rank == 0:
            report.write(self._config.run_dir / "data_report.json", step=self.step)
        self._mesh.agree(report.check)

    def _log(self, loss: Tensor) -> Mapping[str, float]:
        """Write the scalars of the step and return them."""
        engine = self._engine
        values = self._meter.read(loss) | self._report.scalars() | self._divergence.scalars()
        values |= {
            "train/lr": learning_rate(self.step - 1, self._config.train.steps, self._config.optim),
            "train/logit_scale": engine.objective.logit_scale.item(),
            "train/grad_norm": engine.grad_norm,
            "train/skipped_steps": engine.skipped_steps,
        }
        self._writer.scalars(self.step, values)
        shown = {"loss": f"{values['train/loss']:.3f}"}
        shown["samples/s"] = format_figure(values["perf/samples_per_second"])
        self._bar.set_postfix(shown, refresh=False)
        self.result.last = values
        self._meter.restart()
        return values

    def _rewind(self) -> None:
        """Load the newest checkpoint and continue behind the batches that were used since."""
        self._phases.enter("loading a checkpoint")
        path = self._checkpoints.newest()
        if path is None:
            raise Diverged(
                f"the loss jumped at step {self.step}, before there is a checkpoint to go back to"
            )
        to_step, _ = self._checkpoints.load(self._engine, path)
        self._divergence.rewound(self.step, to_step)
        self.step = to_step
        self._open_batches()

    def _open_batches(self) -> None:
        """Open the data at ``step``, and remove what was recorded after it."""
        skipped = self._divergence.skipped_batches
        self._batches = broadcast_batches(self._data, self._config, self._mesh, self.step, skipped)
        self._sample_log = SampleLog(self._config, self._mesh, self.step, skipped)
        self._writer.cut_back(self.step)
        self._bar.update(self.step - self._bar.n)
        self._meter.restart()

    def _save(self) -> None:
        """Start to save what the run needs to resume from here."""
        self._phases.enter("saving")
        state = self._report.state() | {"health": self._divergence.state()}
        self._checkpoints.save(self._engine, self.step, state)
        self._save_requested = False
        self._meter.restart()

    def _evaluate(self) -> None:
        """Score the model as it is, if there is an evaluator."""
        if self._evaluator is None:
            return
        self._phases.enter("evaluating")
        try:
            with self._engine.evaluation_model() as model:
                self.result.evaluation = self._evaluator(model, self._writer, self.step)
        except ValueError as error:
            raise AgreedError(str(error)) from error
        self._writer.scalars(self.step, self.result.evaluation)
        self._meter.restart()

    def _finish(self) -> None:
        """Wait until nothing is under way any more."""
        self._phases.enter("saving")
        self._request_reducer.close()
        self._checkpoints.wait()
        self._writer.end()


def _build_model(config: Config, mesh: Mesh, weights: InitConfig) -> CLIP:
    """Return this rank's part of the model, from the seed or from trained weights."""
    torch.manual_seed(config.train.seed)
    model = CLIP(config.model, mesh, loss=config.loss.kind, units=stage_units(config, mesh.pp))
    mesh.agree(lambda: load_pretrained(model, weights))
    lock_towers(model, config.init)
    model.recompute_activations(config.train.activation_checkpointing)
    if config.train.compile:
        model.compile_blocks()
    return model


def _model_inputs(batch: Batch, config: Config, mesh: Mesh, number: int) -> tuple[Tensor, ...]:
    """Return the model's arguments: images, texts and, with patch dropout, the patches to keep.

    ``number`` is the position of the global batch in the order of the data.
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


def _open_data(config: Config, mesh: Mesh) -> TrainData:
    """Open the training data; rank 0 alone lists the shards, which may be tens of thousands."""
    groups = mesh.from_rank_zero(
        lambda: find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    )
    return mesh.agree(lambda: TrainData(config, groups, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size))

"""The one training loop."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ds_linclip.checkpoint.best import BestCheckpoint
from ds_linclip.checkpoint.manager import CheckpointManager, NotSaved
from ds_linclip.config import Config, InitConfig, check_steps, with_steps
from ds_linclip.data import Batch, DataReport, Storage, TrainData, find_shards
from ds_linclip.data.broadcast import broadcast_batches
from ds_linclip.engine.compilation import Compilation, plan_compilation
from ds_linclip.engine.deepspeed_config import check_machine, deepspeed_config, open_monitor
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer, ema_decay, learning_rate
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.model import CLIP
from ds_linclip.model.freeze import lock_towers
from ds_linclip.model.patch_dropout import model_inputs
from ds_linclip.monitoring.folder_sync import synced
from ds_linclip.monitoring.metrics import MetricWriter, SampleLog, StepMeter
from ds_linclip.monitoring.profile import StepProfiler
from ds_linclip.monitoring.sinks import open_sinks
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.plan import describe, plan_rank
from ds_linclip.preflight.shared_folder import check_run_folder
from ds_linclip.process.consensus import AgreedCrash, AgreedError
from ds_linclip.process.number_text import format_figure
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
from ds_linclip.teacher import Teacher

__all__ = ["Evaluator", "TrainResult", "Trainer", "train"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Evaluator(Protocol):
    """Scores the model during training.

    All ranks call every method together, with a model in eval mode and without gradients. A
    ValueError or AgreedCrash must be raised on all ranks, or by one after its last communication;
    any other exception ends its rank.
    """

    @property
    def metrics(self) -> Mapping[str, Literal["max", "min"]]:
        """The tags that a call returns, and which end of each is better."""

    def rehearse(self, model: CLIP, phases: PhaseTracker) -> None:
        """Try before the first step what the later calls need."""

    def __call__(self, model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        """Return the scores after a number of steps, by their TensorBoard tags."""


@dataclass(kw_only=True)
class TrainResult:
    """Figures of a finished run."""

    steps: int
    #: Values of the last logging step; empty when the run was already finished.
    last: Mapping[str, float] = field(default_factory=dict)
    #: Values of the last evaluation; empty without an evaluator.
    evaluation: Mapping[str, float] = field(default_factory=dict)
    #: A line for each kind of data that was replaced, damaged or passed over.
    data_findings: Sequence[str] = ()


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
        evaluate: Scores the model every ``eval.every_steps`` and after the last step; it is
            rehearsed before the first one.
        phases: Records what this rank is doing, for a watchdog to read.

    Returns:
        The figures of the last logged step and the last evaluation.

    Raises:
        AgreedError: on all ranks together, before the first step, for anything in the config that
            does not fit the data, the ranks or the run folder; later, when training or held-out
            data cannot be read any more, or a log or a checkpoint cannot be written. The step is
            saved first.
        AgreedCrash: likewise for other errors in a data worker, an evaluation or a log.
        Preempted: on all ranks together, when one received SIGTERM and the step is saved.
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
        self._signals = resources.enter_context(PreemptionSignals().caught())
        config, self._data = _open_data(config, mesh)
        self._config, self._mesh, self._evaluator, self._phases = config, mesh, evaluate, phases
        mesh.agree(lambda: check_machine(config))
        mesh.agree(lambda: deepspeed_config(config, mesh))
        compilation = mesh.agree(lambda: plan_compilation(config, mesh))
        self._is_captured = bool(compilation.captured)
        self._profiler = StepProfiler(config, mesh)
        resources.callback(self._profiler.close)
        folder = resources.enter_context(RunFolder.hold(config, mesh))
        resources.enter_context(synced(config, mesh, phases))
        listeners = resources.enter_context(open_sinks(config, mesh, phases))
        phases.enter("building the model")
        self._teacher = Teacher(config, mesh) if config.teacher.model else None
        self._checkpoints = CheckpointManager(config, mesh, self._data.identity)
        resources.callback(self._checkpoints.close)
        metrics = evaluate.metrics if evaluate and config.checkpoint.keep_best else {}
        self._best = BestCheckpoint(config, mesh, self._checkpoints, metrics)
        resume_from = self._checkpoints.newest()
        folder.record_start(resume_from)
        self._checkpoints.remove_leftovers()
        check_run_folder(config, mesh)

        weights = InitConfig() if resume_from else config.init
        self._model = _build_model(config, mesh, weights, compilation)
        if self._teacher:
            self._teacher.prepare(self._model)
        plan = describe(config, mesh, mesh.gather_all(plan_rank(config, mesh)))
        optimizer = build_optimizer(self._model, config.optim)
        self._engine = initialize_engine(self._model, optimizer, config, mesh)
        if compilation.loss:
            self._engine.objective.compile(**compilation.options("loss"))
        self._report = DataReport(config.data.max_bad_samples)
        self._divergence = DivergenceGuard(config, mesh, self._checkpoints)
        self.step = 0
        if resume_from:
            phases.enter("loading a checkpoint")
            self.step, state = self._checkpoints.load(self._engine, resume_from)
            self._report.load_state(state)
            self._divergence.load_state(state["health"])
        monitor = mesh.agree(lambda: open_monitor(config))
        self._writer = MetricWriter(config, mesh, monitor, listeners)
        if mesh.rank == 0:
            start = f"resumed from {resume_from}" if self.step else "from step 0"
            logger.info("%s\n%s\ntrain.compile: %s", start, plan, compilation.text)
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
        self._check_records()
        self._model.train()

    def run(self) -> TrainResult:
        """Take the steps that are left; log, save and evaluate when it is due.

        An error that all ranks know of ends the run after the last step is saved.
        """
        if self._evaluator is not None:
            rehearse = self._evaluator.rehearse
            self._with_evaluation_model(lambda model: rehearse(model, self._phases))
        try:
            self._run()
        except NotSaved:
            raise
        except (AgreedError, AgreedCrash) as error:
            raise type(error)(f"{error}; {self._save_before_the_end()}") from error
        return self.result

    def _run(self) -> None:
        config = self._config
        if self.step > 0 and self._is_evaluation_owed():
            self._evaluate()
        while self.step < config.train.steps:
            loss = self.train_step()
            is_leaving = self._receive_requests().leave
            is_logged = self._is_due(config.log.every_steps)
            is_saved = self._is_save_due() or is_leaving
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

    def train_step(self) -> Tensor:
        """Take one optimizer step on the next global batch.

        Returns:
            The loss [] of this rank's rows, on the device.
        """
        config, done = self._config, self.step
        self._profiler.before_step(done + 1)
        self._phases.enter("waiting for data", done + 1)
        started = time.perf_counter()
        batch = next(self._batches)
        self._meter.waited(time.perf_counter() - started)
        counters = self._engine.state.skip_counters()

        self._phases.enter("computing features")
        if self._is_captured:  # what the last step's CUDA graphs returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        number = done + self._divergence.skipped_batches
        inputs = model_inputs(batch.images, batch.texts, number, config, self._mesh)
        self._engine.objective.set_weights(done, config.train.steps)
        loss = self._engine.step(
            inputs,
            lr=learning_rate(done, config.train.steps, config.optim),
            ema_decay=ema_decay(done, config.optim.ema_decay),
            targets=self._teacher(batch.images, batch.texts) if self._teacher else (),
        )
        if self._engine.was_skipped:
            self._check_batch(batch, counters)
        self.step += 1

        self._report.add(batch)
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
        self._profiler.after_step()
        return loss

    def _check_batch(self, batch: Batch, counters: Mapping[str, Any]) -> None:
        """Raise on all ranks why one of them had no samples, so that the step was skipped.

        The training state is then that before the step, with these ``counters``.
        """
        try:
            self._mesh.agree(lambda: _raise_first([batch.failure]), (Exception,))
        except (AgreedError, AgreedCrash):
            self._engine.state.set_skip_counters(counters)
            raise

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
            AgreedError: when a save or a log has failed on any rank.
        """
        save, leave = self._signals.take()
        save |= not self._divergence.is_skipping and self._checkpoints.is_due_by_clock()
        own_logs = (self._sample_log, self._profiler)
        has_failed = self._checkpoints.has_failed or any(log.failure for log in own_logs)
        mine = RunRequests(save=save, leave=leave, has_failed=has_failed)
        requests = self._request_reducer.reduce(mine)
        if requests.has_failed:
            self._check_records()  # first, for all ranks call it; the next line may raise on some
            self._checkpoints.wait()
            raise NotSaved(f"another rank takes {self._checkpoints.last} for not saved")
        self._save_requested |= requests.save
        return requests

    def _check_records(self) -> None:
        """Raise on all ranks the failure of a log of one of them, or that too many samples are
        bad."""

        def check() -> None:
            logs = (self._writer, self._sample_log, self._profiler)
            _raise_first([log.failure for log in logs])
            self._report.check()

        self._mesh.agree(check, (Exception,))

    def _count_samples(self) -> None:
        """Sum over ranks the samples and faults met in the data, and write the sums."""
        self._phases.enter("logging")
        self._report.merge(self._mesh.gather(self._report.take()))
        if self._mesh.rank == 0:
            self._report.write(self._config.run_dir / "data_report.json", step=self.step)

    def _log(self, loss: Tensor) -> Mapping[str, float]:
        """Write the scalars of the step and return them.

        Raises:
            AgreedError: when too many samples are bad, or the scalars cannot be written.
        """
        self._count_samples()
        engine = self._engine
        values = self._meter.read(loss) | self._report.scalars() | self._divergence.scalars()
        values |= {
            "train/lr": learning_rate(self.step - 1, self._config.train.steps, self._config.optim),
            "train/logit_scale": engine.objective.logit_scale.item(),
            "train/grad_norm": engine.grad_norm,
            "train/skipped_steps": engine.skipped_steps,
        }
        values |= engine.objective.scalars()
        self._writer.scalars(self.step, values)
        shown = {"loss": f"{values['train/loss']:.3f}"}
        shown["samples/s"] = format_figure(values["perf/samples_per_second"])
        self._bar.set_postfix(shown, refresh=False)
        self.result.last = values
        self._check_records()
        self._meter.restart()
        return values

    def _rewind(self) -> None:
        """Load the newest checkpoint and continue behind the batches that were used since."""
        self._phases.enter("loading a checkpoint")
        try:
            path = self._checkpoints.newest()
            if path is None:
                raise AgreedError("there is none")
            to_step, _ = self._checkpoints.load(self._engine, path)
        except AgreedError as error:  # nothing to save: the weights may be damaged
            raise Diverged(
                f"the loss jumped at step {self.step}, and there must be a checkpoint to go back "
                f"to: {error}"
            ) from error
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
        """Start to save what the run needs to resume from here.

        Raises:
            Diverged: when the weights are not finite.
        """
        self._count_samples()
        self._phases.enter("saving")
        self._divergence.check_weights(self.step, self._engine.state.first_nonfinite())
        state = self._report.state() | {"health": self._divergence.state()}
        self._checkpoints.save(self._engine, self.step, state)
        self._save_requested = False
        self._meter.restart()

    def _save_before_the_end(self) -> str:
        """Save the last step because of an error that all ranks know of; return what came of it."""
        if self.step == 0:
            return "no step was taken"
        try:
            self._save()
            self._checkpoints.wait()
        except (AgreedError, Diverged) as error:
            return f"step {self.step} is not saved: {error}"
        return f"step {self.step} is saved, and the same command resumes there"

    def _is_evaluation_owed(self) -> bool:
        """Whether the weights that the run resumes from are to be scored first.

        The run may have ended between a save and the evaluation of the same step; that of a
        finished run is repeated for its result.
        """
        if self.step == self._config.train.steps:
            return True
        return self._is_due(self._config.eval.every_steps) and not self._mesh.from_rank_zero(
            lambda: self._writer.is_evaluated(self.step)
        )

    def _evaluate(self) -> None:
        """Score the model as it is, if there is an evaluator."""
        evaluator = self._evaluator
        if evaluator is None:
            return
        self._phases.enter("evaluating")
        self.result.evaluation = self._with_evaluation_model(
            lambda model: evaluator(model, self._writer, self.step)
        )
        self._writer.scalars(self.step, self.result.evaluation)
        self._check_records()
        if self._best.is_better(self.result.evaluation):
            self._save()  # nothing to do if this step is saved
            self._best.record(self.result.evaluation)
        self._meter.restart()

    def _with_evaluation_model(self, work: Callable[[CLIP], T]) -> T:
        """Call an evaluator's method, and share its error when the weights are back in place."""
        result: list[T] = []
        failures: list[Exception] = []
        with self._engine.evaluation_model() as model:
            try:
                result.append(work(model))
            except (ValueError, AgreedCrash) as error:
                failures.append(error)
        self._mesh.agree(lambda: _raise_first(failures), (Exception,))
        return result[0]

    def _finish(self) -> None:
        """Wait until nothing is under way any more."""
        self._phases.enter("saving")
        self._profiler.close()
        self._request_reducer.close()
        self._checkpoints.wait()
        self._writer.end()
        self.result.data_findings = self._report.describe()
        self._check_records()


def _raise_first(failures: Sequence[Exception | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure


def _build_model(config: Config, mesh: Mesh, weights: InitConfig, compilation: Compilation) -> CLIP:
    """Return this rank's part of the model, from the seed or from trained weights."""
    torch.manual_seed(config.train.seed)
    model = CLIP(config.model, mesh, loss=config.loss.kind, units=stage_units(config, mesh.pp))
    mesh.agree(lambda: load_pretrained(model, weights))
    lock_towers(model, config.init)
    model.recompute_activations(config.train.activation_checkpointing)
    if compilation.model == "blocks":
        model.compile_blocks()
    elif compilation.model == "towers":
        model.compile_towers(**compilation.options("model"))
    return model


def _open_data(config: Config, mesh: Mesh) -> tuple[Config, TrainData]:
    """Open the training data; return the config, its length in steps, and the data.

    Rank 0 alone lists the shards, which may be tens of thousands.
    """
    groups = mesh.from_rank_zero(
        lambda: find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    )
    counted = with_steps(config, sum(group.samples_per_epoch for group in groups))
    mesh.agree(lambda: check_steps(counted))
    places = {"dp_rank": mesh.dp.rank, "dp_size": mesh.dp.size}
    return counted, mesh.agree(lambda: TrainData(counted, groups, **places))

"""Measuring and recording: step times and rates, scalars, figures, the keys of samples."""

import json
import math
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.model.flops import step_flops
from ds_linclip.monitoring.log import Log
from ds_linclip.monitoring.scalars import ScalarSink
from ds_linclip.monitoring.stragglers import StragglerDetector
from ds_linclip.monitoring.tensorboard import begin_session, end_session
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.device_specs import device_spec
from ds_linclip.process.atomic import atomic_file

__all__ = ["MetricWriter", "SampleLog", "StepMeter"]


class MetricWriter(Log):
    """Records scalars and figures on rank 0; on the other ranks every method does nothing.

    Scalars go to ``<run folder>/metrics.jsonl``, one JSON object per call (null: not finite), to
    TensorBoard and the other back ends of ``monitor``, and to ``sinks``. In the file and in
    TensorBoard every step is there once: :meth:`cut_back` removes what was recorded after the step
    from which training resumes. ``monitor`` is DeepSpeed's, or None.
    """

    def __init__(
        self, config: Config, mesh: Mesh, monitor: Any, sinks: Sequence[ScalarSink] = ()
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._is_writer = mesh.rank == 0
        self._monitor = monitor
        self._sinks = sinks
        self._path = config.run_dir / "metrics.jsonl"
        self._monitor_name = f"{config.run_dir / 'tensorboard'}, or another monitor,"
        tensorboard = getattr(monitor, "tb_monitor", None) if self._is_writer else None
        self._board = None if tensorboard is None else tensorboard.summary_writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values measured after ``step`` optimizer steps."""
        if not self._is_writer:
            return
        with self.keeping_failure(self._monitor_name):
            self._monitor.write_events([(tag, value, step) for tag, value in values.items()])
        record = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with self.keeping_failure(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for sink in self._sinks:
            with self.keeping_failure("log.wandb or log.trackio"):
                sink(step, values)

    def begin(self, step: int, plan: str) -> None:
        """Write config, hyperparameters and ``plan`` (Markdown) to TensorBoard at the start."""
        with self.keeping_failure(self._monitor_name):
            if self._board is not None:
                begin_session(self._board, self._config, self._mesh.world_size, plan, step)

    def end(self) -> None:
        """Mark the run as finished in TensorBoard."""
        with self.keeping_failure(self._monitor_name):
            if self._board is not None:
                end_session(self._board, self._config, self._mesh.world_size)

    def cut_back(self, step: int) -> None:
        """Remove what was recorded after ``step``, from which training resumes.

        The lines are moved to ``metrics_undone.jsonl``; TensorBoard hides its points. A line that a
        kill has cut off is dropped.
        """
        if not self._is_writer:
            return
        with self.keeping_failure(self._monitor_name):
            self._hide_points(step)
        with self.keeping_failure(self._path):
            self._path.touch()
            self._move_lines(step)

    def is_evaluated(self, step: int) -> bool:
        """Whether the scores of an evaluation after ``step`` are recorded; rank 0 knows."""
        if not self._is_writer or not self._path.exists():
            return False
        with self._path.open(errors="replace") as lines:
            return any('"eval/' in line and _step_of(line) == step for line in lines)

    def _hide_points(self, step: int) -> None:
        if self._board is not None and self._board.file_writer is not None:
            from tensorboard.compat.proto import event_pb2  # takes long; needed if there is a board

            purge = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._board.file_writer.add_event(event_pb2.Event(step=step + 1, session_log=purge))

    def _move_lines(self, step: int) -> None:
        undone = self._path.with_name("metrics_undone.jsonl")
        with (
            self._path.open(errors="replace") as lines,
            atomic_file(self._path) as partial,
            partial.open("w") as before,
            undone.open("a") as after,
        ):
            for line in lines:
                recorded = _step_of(line)
                if recorded is not None:
                    (before if recorded <= step else after).write(line)
        if undone.stat().st_size == 0:
            undone.unlink()

    def figure(self, step: int, tag: str, figure: Any) -> None:
        """Draw a matplotlib figure into TensorBoard."""
        if self._board is not None:
            with self.keeping_failure(self._monitor_name):
                self._board.add_figure(tag, figure, step)
                self._board.flush()


class SampleLog(Log):
    """Records which samples every step used: one JSON object per step and data-parallel rank.

    Does nothing unless ``log.sample_keys`` is set. Steps that are repeated after a resume or a
    rewind appear twice, with different ``start`` (from which training started or resumed) and
    ``skipped_batches`` (global batches that rewinds have left out by then).
    """

    def __init__(self, config: Config, mesh: Mesh, start: int, skipped_batches: int) -> None:
        self._path: Path | None = None
        ranks = mesh.dp.size
        self._facts = {"start": start, "skipped_batches": skipped_batches, "ranks": ranks}
        if config.log.sample_keys and mesh.is_first_of_its_data:
            self._path = config.run_dir / "samples" / f"rank-{mesh.dp.rank:05d}.jsonl"
            with self.keeping_failure(self._path):
                self._path.parent.mkdir(exist_ok=True)
                self._path.touch()

    def write(self, step: int, keys: Sequence[str]) -> None:
        """Record the keys of this rank's part of the batch of ``step``."""
        if self._path is not None:
            with self.keeping_failure(self._path), self._path.open("a") as file:
                file.write(json.dumps({"step": step, **self._facts, "keys": keys}) + "\n")


class StepMeter:
    """Measures the steps between two logging steps; only :meth:`read` waits for the device."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._peak_tflops = _peak_tflops(config, mesh.device)
        self._stragglers = StragglerDetector(mesh, config.watchdog.slow_rank_ratio)
        self.restart()

    def restart(self) -> None:
        """Start a new interval, after a log or a pause in training."""
        self._started = time.perf_counter()
        self._waited = self._flops = 0.0
        self._steps = self._samples = self._tokens = 0
        self._stragglers.restart()

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds
        self._stragglers.data_ready(seconds)

    def features_ready(self) -> None:
        """Mark the end of this rank's own part of a step, before it waits for others."""
        self._stragglers.features_ready()

    def step_done(self, step: int, *, samples: int, tokens: int) -> None:
        """Add a step with this rank's samples and tokens."""
        self._steps += 1
        self._flops += step_flops(self._config, step - 1)
        self._samples += samples
        self._tokens += tokens

    def read(self, loss: Tensor) -> dict[str, float]:
        """Return the values of the interval over all ranks, by tag; a collective of all ranks.

        The wait for data is that of the rank that waited longest, as the others wait for it.
        ``loss`` [] is that of this rank's rows in the last step.
        """
        mine = (loss.item(), self._waited)
        losses, waits = zip(*self._mesh.gather(mine), strict=True)
        # After the wait for the device, so that its queued work is inside the interval.
        seconds = time.perf_counter() - self._started
        steps, ranks = max(self._steps, 1), self._mesh.dp.size
        tflops = self._flops / seconds / self._mesh.world_size / 1e12
        mfu = {} if self._peak_tflops is None else {"perf/mfu": tflops / self._peak_tflops}
        return {
            "train/loss": statistics.fmean(losses),
            "perf/samples_per_second": self._samples * ranks / seconds,
            "perf/tokens_per_second": self._tokens * ranks / seconds,
            "perf/data_seconds_per_step": max(waits) / steps,
            "perf/seconds_per_step": seconds / steps,
            "perf/model_tflops_per_device": tflops,
            **mfu,
            "perf/peak_memory_gib": _peak_memory_gib(loss.device),
            **self._stragglers.read(seconds / steps),
        }


def _peak_tflops(config: Config, device: torch.device) -> float | None:
    """Return the peak of one device in TFLOP/s, or None if it is not known."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    known = device_spec(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16_flops / 1e12


def _step_of(line: str) -> int | None:
    """Return the step of a record; None for an incomplete line."""
    try:
        record = json.loads(line) if line.endswith("\n") else {}
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""What a run tells about itself: scalars, figures, and the sums they are made from."""

import json
import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh

__all__ = ["MetricWriter", "StepMeter", "peak_memory_gib"]


class MetricWriter:
    """Writes on rank 0; the other ranks call it for nothing.

    Scalars go through ``engine.monitor`` (TensorBoard and whatever else DeepSpeed is told to feed)
    and, one JSON object per call, into ``<run folder>/metrics.jsonl`` (null: not finite).
    """

    def __init__(self, config: Config, mesh: Mesh, monitor: Any) -> None:
        self._is_writer = mesh.rank == 0
        self._monitor = monitor
        self._path = config.run_dir / "metrics.jsonl"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values measured after ``step`` optimizer steps."""
        if not self._is_writer:
            return
        self._monitor.write_events([(tag, value, step) for tag, value in values.items()])
        record = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")

    def figure(self, step: int, tag: str, figure: Any) -> None:
        """Draw a matplotlib figure into TensorBoard."""
        board = getattr(self._monitor, "tb_monitor", None) if self._is_writer else None
        if board is not None and board.summary_writer is not None:
            board.summary_writer.add_figure(tag, figure, step)
            board.summary_writer.flush()


class StepMeter:
    """Sums over the steps between two logging steps; reads the device only when asked."""

    def __init__(self, mesh: Mesh, samples_per_step: int, tokens_per_sample: int) -> None:
        self._mesh = mesh
        self._samples_per_step = samples_per_step
        self._tokens_per_sample = tokens_per_sample
        self._skipped: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """Start a new interval, after a log or a pause in training."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    def step_done(self, skipped: Mapping[str, int]) -> None:
        self._steps += 1
        self._skipped.update(skipped)

    def read(self, loss: Tensor) -> dict[str, float]:
        """Values of the interval, and the loss of its last step averaged over the data ranks.

        Bad samples are counted from the start of this process on, over all data ranks, by cause.
        """
        mine: tuple[float, Counter[str]] = (loss.item(), self._skipped)
        ranks = [mine] * self._mesh.dp_size
        if self._mesh.dp_size > 1:
            dist.all_gather_object(ranks, mine, group=self._mesh.dp_group)
        skipped = sum((counts for _, counts in ranks), Counter[str]())
        # After the wait for the device, so that its queued work is inside the interval.
        seconds = time.perf_counter() - self._started
        rate = self._steps * self._samples_per_step / seconds if self._steps else math.nan
        return {
            "train/loss": statistics.fmean(loss for loss, _ in ranks),
            "perf/samples_per_second": rate,
            "perf/tokens_per_second": rate * self._tokens_per_sample,
            "perf/data_seconds_per_step": self._waited / max(self._steps, 1),
            "perf/seconds_per_step": seconds / max(self._steps, 1),
            "perf/peak_memory_gib": peak_memory_gib(loss.device),
            "data/skipped_samples": skipped.total(),
            **{f"data/skipped/{cause}": count for cause, count in skipped.items()},
        }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""Traces of chosen steps by torch's profiler."""

import logging

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from ds_linclip.config import Config
from ds_linclip.monitoring.log import Log
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError

__all__ = ["StepProfiler"]

logger = logging.getLogger(__name__)


class StepProfiler(Log):
    """Traces the steps that ``log.profile`` chooses, on the ranks that it chooses.

    A rank writes ``<run folder>/profile/rank-R-step-N.pt.trace.json.gz`` once, N being the first
    chosen step: a run that resumes or rewinds does not repeat it.

    Raises:
        AgreedError: on all ranks, when a chosen rank does not exist.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        chosen = config.log.profile
        if chosen.steps and (absent := [r for r in chosen.ranks if r >= mesh.world_size]):
            raise AgreedError(
                f"log.profile.ranks ({absent[0]}) must be a rank of this run, which has "
                f"{mesh.world_size}: take one below {mesh.world_size}"
            )
        name = f"rank-{mesh.rank:05d}-step-{chosen.first_step}.pt.trace.json.gz"
        self._path = config.run_dir / "profile" / name
        self._steps = range(chosen.first_step, chosen.first_step + chosen.steps)
        self._is_wanted = bool(self._steps) and mesh.rank in chosen.ranks
        self._device = mesh.device
        self._trace: profile | None = None
        self._left = 0

    def before_step(self, step: int) -> None:
        """Begin the trace if this is its first step; ``step`` is counted from 1."""
        if not self._is_wanted or step < self._steps.start:
            return
        self._is_wanted = False
        if self._path.exists():
            return
        if step not in self._steps:
            logger.warning("log.profile: no trace, for training is past step %d", self._steps[-1])
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self.keeping_failure(self._path):
            trace = profile(activities=activities, schedule=_record_all, acc_events=True)
            trace.step_num = step
            trace.start()
            self._trace, self._left = trace, self._steps.stop - step

    def after_step(self) -> None:
        """Mark the end of a step, and write the trace after the last one."""
        if self._trace is None:
            return
        self._left -= 1
        if self._left == 0:
            self.close()
        else:
            self._trace.step()

    def close(self) -> None:
        """Write the trace that is under way, if there is one, to the run folder."""
        if self._is_wanted:
            self._is_wanted = False
            logger.warning("log.profile: no trace, for step %d did not come", self._steps.start)
        trace, self._trace = self._trace, None
        if trace is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # for the kernels of the last step
        partial = self._path.with_name(f"unfinished-{self._path.name}")
        with self.keeping_failure(self._path):
            trace.stop()
            self._path.parent.mkdir(exist_ok=True)
            try:
                trace.export_chrome_trace(str(partial))
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)
            logger.info("log.profile: trace written to %s", self._path)
        if self.failure is not None:
            logger.error("log.profile: %s", self.failure)


def _record_all(_: int) -> ProfilerAction:
    return ProfilerAction.RECORD

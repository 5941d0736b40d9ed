"""Detection of divergence: steps skipped in a row, losses that are not finite, loss spikes."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor

from ds_linclip.checkpoint.loading import latest_checkpoint
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError

__all__ = ["Diverged", "DivergenceGuard"]

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Training cannot continue by itself; raised on all ranks after the same step."""


class DivergenceGuard:
    """Checks every step and every logged loss; all ranks call every method together.

    All ranks reach the same verdict: DeepSpeed sums the gradient norm over the ranks before it
    skips a step, and rank 0's logged loss decides. Before :class:`Diverged` is raised, the save
    under way is finished, and the message names the newest checkpoint.

    Attributes:
        skipped_batches: Global batches of the data order that rewinds have left out: the batch of
            step s is number ``s - 1 + skipped_batches``.
        is_skipping: Whether the last step was skipped; the weights are those of an earlier one.
    """

    def __init__(self, config: Config, mesh: Mesh, checkpoints: CheckpointManager) -> None:
        self.skipped_batches = 0
        self._config = config
        self._mesh = mesh
        self._checkpoints = checkpoints
        self._rewinds = 0
        self._losses: deque[float] = deque(maxlen=config.health.spike_window)
        self._reset()

    def _reset(self) -> None:
        self.is_skipping = False
        self._first_skipped = 0
        self._streak = 0  # skipped steps in a row, without excused ones
        self._last_good: tuple[int, Tensor] | None = None

    def step_done(self, step: int, loss: Tensor, *, was_skipped: bool, is_excused: bool) -> None:
        """Check the step just taken; this does not wait for the device unless training ends.

        Args:
            step: Its number.
            loss: Its loss [] on this rank.
            was_skipped: Whether its gradient was not finite, so that the weights are unchanged.
            is_excused: Whether fp16's loss scale may be the cause.

        Raises:
            Diverged: after ``health.max_skipped_steps`` in a row.
        """
        if not was_skipped:
            self.is_skipping = False
            self._streak = 0
            self._last_good = (step, loss)
            return
        if not self.is_skipping:
            self.is_skipping = True
            self._first_skipped = step
        self._streak += not is_excused
        if self._mesh.rank == 0:
            reason = " (fp16: the loss scale is lowered)" if is_excused else ""
            logger.warning(
                "step %d skipped: its gradient is not finite%s; weights and optimizer state are "
                "those before it%s",
                *(step, reason, self._samples_hint()),
            )
        if self._streak >= self._config.health.max_skipped_steps:
            raise Diverged(self._too_many_skipped(step))

    def check_loss(self, step: int, loss: float) -> None:
        """Check that a logged loss is finite.

        Raises:
            Diverged: when it is not although its step was taken, so that the weights cannot be
                trusted, or when the step was the last one.
        """
        is_last = step == self._config.train.steps
        if math.isfinite(loss) or (self.is_skipping and not is_last):
            return
        how = (
            "it is the last one" if self.is_skipping else "its gradient was finite and it was taken"
        )
        raise Diverged(f"the loss of step {step} is {loss}, and {how}. {self._checkpoint_hint()}")

    def check_weights(self, step: int, nonfinite: str | None) -> None:
        """Check that the weights to be saved are finite.

        Args:
            step: The last step.
            nonfinite: The first parameter on this rank that is not finite, if there is one.

        Raises:
            Diverged: when there is one on any rank: the last step was too large.
        """
        found = [name for name in self._mesh.gather_all(nonfinite) if name is not None]
        if found:
            raise Diverged(
                f"the weights after step {step} are not finite ({found[0]}): a step was too large. "
                f"{self._checkpoint_hint()}"
            )

    def is_spike(self, step: int, loss: float) -> bool:
        """Whether a logged loss exceeds ``health.spike_factor`` times the median of the last ones.

        Raises:
            Diverged: when it does and ``health.max_rewinds`` are used up.
        """
        health = self._config.health
        if health.spike_factor == 0:
            return False
        loss = self._mesh.from_rank_zero(lambda: loss)
        if not math.isfinite(loss):
            return False
        is_full = len(self._losses) == self._losses.maxlen
        median = statistics.median(self._losses) if is_full else math.inf
        if loss <= health.spike_factor * median:
            self._losses.append(loss)
            return False
        spike = (
            f"the loss of step {step} ({loss:.4f}) is more than health.spike_factor "
            f"({health.spike_factor}) times the median of the {len(self._losses)} logged before it "
            f"({median:.4f})"
        )
        if self._rewinds >= health.max_rewinds:
            raise Diverged(
                f"{spike}, and health.max_rewinds ({health.max_rewinds}) are used up. "
                f"{self._checkpoint_hint()}"
            )
        if self._mesh.rank == 0:
            logger.warning("%s", spike)
        return True

    def rewound(self, step: int, to_step: int) -> None:
        """Record that training continues from the checkpoint of ``to_step`` after a loss spike at
        ``step``, without the batches used since."""
        left_out = step - to_step
        self.skipped_batches += left_out
        self._rewinds += 1
        self._reset()
        if self._mesh.rank == 0:
            logger.warning(
                "rewound from step %d to step %d; the %d batches since are left out "
                "(rewind %d of at most %d)",
                *(step, to_step, left_out, self._rewinds, self._config.health.max_rewinds),
            )

    def scalars(self) -> dict[str, float]:
        """Return values to log, by TensorBoard tag."""
        return {"train/rewinds": self._rewinds, "train/skipped_batches": self.skipped_batches}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain data."""
        return {
            "skipped_batches": self.skipped_batches,
            "rewinds": self._rewinds,
            "losses": list(self._losses),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self._reset()
        self.skipped_batches = state["skipped_batches"]
        self._rewinds = state["rewinds"]
        self._losses = deque(state["losses"], self._losses.maxlen)

    def _too_many_skipped(self, step: int) -> str:
        last = "no step was taken before"
        if self._last_good is not None:
            good_step, loss = self._last_good
            losses = self._mesh.gather(loss.item())
            last = f"the last loss before was {statistics.fmean(losses):.4f} at step {good_step}"
        return (
            f"steps {self._first_skipped} to {step} were all skipped, as their gradients were not "
            f"finite (health.max_skipped_steps {self._config.health.max_skipped_steps}); {last}. "
            f"The weights have stayed those of step {self._first_skipped - 1}. "
            f"{self._checkpoint_hint()}"
        )

    def _checkpoint_hint(self) -> str:
        failed = ""
        try:
            self._checkpoints.wait()
        except AgreedError as error:
            failed = f" ({error})"
        try:
            newest = f"the newest checkpoint is {latest_checkpoint(self._config.run_dir)}"
        except ValueError:
            newest = "there is no checkpoint"
        return f"Nothing more is saved; {newest}{failed}{self._samples_hint()}"

    def _samples_hint(self) -> str:
        if not self._config.log.sample_keys:
            return ""
        return f"; the keys of its samples are in {self._config.run_dir / 'samples'}"

"""Whether training is still going somewhere: steps skipped in a row, losses that jump."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor

from ds_linclip.checkpoint import CheckpointStore, latest_checkpoint
from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError

__all__ = ["Diverged", "Health"]

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Training cannot go on by itself; raised on all ranks after the same step."""


class Health:
    """Judges every step and every logged loss; all ranks call every method together.

    All ranks come to the same judgement: whether a step was skipped they know from DeepSpeed, which
    has added up the gradient's norm over them, and a logged loss is rank 0's word.

    Args:
        config, mesh: of the run.
        checkpoints: those of the run; the end waits for what is still being saved, and names it.

    Attributes:
        skipped_batches: global batches of the data order that the run has left out: the batch of
            step s is number ``s - 1 + skipped_batches``.
        is_skipping: whether the last step was skipped; the weights are those of an earlier one.
    """

    def __init__(self, config: Config, mesh: Mesh, checkpoints: CheckpointStore) -> None:
        self.skipped_batches = 0
        self._config = config
        self._mesh = mesh
        self._checkpoints = checkpoints
        self._rewinds = 0
        self._losses: deque[float] = deque(maxlen=config.health.spike_window)
        self._begin()

    def _begin(self) -> None:
        self.is_skipping = False
        self._first_skipped = 0
        self._streak = 0  # skipped steps in a row that count
        self._last_good: tuple[int, Tensor] | None = None

    def step_done(self, step: int, loss: Tensor, *, was_skipped: bool, is_excused: bool) -> None:
        """Judge a step; does not wait for the device unless training ends.

        Args:
            step: the step that is done.
            loss: its loss on this rank, [].
            was_skipped: its gradient was not finite and the weights stay as they were.
            is_excused: the loss scale may be to blame.

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
                step,
                reason,
                self._where_samples_are(),
            )
        if self._streak >= self._config.health.max_skipped_steps:
            raise Diverged(self._end_of_skipping(step))

    def check_loss(self, step: int, loss: float) -> None:
        """Judge a logged loss by itself.

        Raises:
            Diverged: when it is not finite although its step was taken: the gradient does not say
                what the loss says, and weights may be anything.
        """
        if not math.isfinite(loss) and not self.is_skipping:
            raise Diverged(
                f"the loss of step {step} is {loss} although its gradient was finite and its step "
                f"was taken. {self._saved()}"
            )

    def is_spike(self, step: int, loss: float) -> bool:
        """Whether a logged loss is more than ``health.spike_factor`` times the median before it.

        Raises:
            Diverged: when it is and ``health.max_rewinds`` are used up.
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
        told = (
            f"the loss of step {step} ({loss:.4f}) is more than health.spike_factor "
            f"({health.spike_factor}) times the median of the {len(self._losses)} logged before it "
            f"({median:.4f})"
        )
        if self._rewinds >= health.max_rewinds:
            raise Diverged(
                f"{told}, and health.max_rewinds ({health.max_rewinds}) are used up. "
                f"{self._saved()}"
            )
        if self._mesh.rank == 0:
            logger.warning("%s", told)
        return True

    def rewound(self, step: int, to_step: int) -> None:
        """Note that training goes on from a checkpoint, without the batches since.

        Args:
            step: the step at which the loss had jumped.
            to_step: the checkpoint's.
        """
        self.skipped_batches += step - to_step
        self._rewinds += 1
        self._begin()
        if self._mesh.rank == 0:
            logger.warning(
                "rewound from step %d to step %d; the %d batches since are left out "
                "(rewind %d of at most %d)",
                step,
                to_step,
                step - to_step,
                self._rewinds,
                self._config.health.max_rewinds,
            )

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag."""
        return {
            "train/rewinds": self._rewinds,
            "train/skipped_batches": self.skipped_batches,
        }

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {
            "skipped_batches": self.skipped_batches,
            "rewinds": self._rewinds,
            "losses": list(self._losses),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._begin()
        self.skipped_batches = state["skipped_batches"]
        self._rewinds = state["rewinds"]
        self._losses.clear()
        self._losses.extend(state["losses"])

    def _end_of_skipping(self, step: int) -> str:
        last = "no step was taken before"
        if self._last_good is not None:
            good_step, loss = self._last_good
            losses = self._mesh.gather(loss.item())
            last = f"the last loss before was {statistics.fmean(losses):.4f} at step {good_step}"
        return (
            f"steps {self._first_skipped} to {step} were all skipped, as their gradients were not "
            f"finite (health.max_skipped_steps {self._config.health.max_skipped_steps}); {last}. "
            f"The weights have stayed those of step {self._first_skipped - 1}. {self._saved()}"
        )

    def _saved(self) -> str:
        failed = ""
        try:
            self._checkpoints.wait()
        except AgreedError as error:
            failed = f" ({error})"
        try:
            newest = f"the newest checkpoint is {latest_checkpoint(self._config.run_dir)}"
        except ValueError:
            newest = "there is no checkpoint"
        return f"Nothing more is saved; {newest}{failed}{self._where_samples_are()}"

    def _where_samples_are(self) -> str:
        if not self._config.log.sample_keys:
            return ""
        return f"; the keys of its samples are in {self._config.run_dir / 'samples'}"

"""The best checkpoint of a run by one of its scores."""

import logging
import math
from collections.abc import Mapping
from typing import Literal

from ds_linclip.checkpoint.directory import BestRecord, read_best, write_best
from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config
from ds_linclip.parallel.mesh import Mesh

__all__ = ["BestCheckpoint"]

logger = logging.getLogger(__name__)


class BestCheckpoint:
    """Keeps the checkpoint with the best score of ``checkpoint.keep_best``; every method is a
    collective of all ranks.

    Args:
        metrics: The scores that evaluations write, and which end of each is better.

    Raises:
        AgreedError: when the score is none of ``metrics``.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        checkpoints: CheckpointManager,
        metrics: Mapping[str, Literal["max", "min"]],
    ) -> None:
        self._metric = config.checkpoint.keep_best
        self._mesh, self._checkpoints = mesh, checkpoints
        mesh.agree(lambda: _check(self._metric, metrics))
        self._sign = -1.0 if self._metric is not None and metrics[self._metric] == "min" else 1.0

    def is_better(self, scores: Mapping[str, float]) -> bool:
        """Return whether these scores are better than those of the recorded checkpoint.

        Raises:
            AgreedError: when the record cannot be read.
        """
        metric = self._metric
        if metric is None:
            return False

        def compare() -> bool:
            best = read_best(self._checkpoints.directory)
            if not math.isfinite(scores[metric]):
                return False
            if best is None or best.metric != metric:
                return True
            return self._sign * scores[metric] > self._sign * best.value

        return self._mesh.from_rank_zero(compare)

    def record(self, scores: Mapping[str, float]) -> None:
        """Wait until the last checkpoint is committed, and record it as the best.

        Raises:
            AgreedError: when it is not saved, or the record cannot be written.
        """
        self._checkpoints.wait()
        assert self._metric is not None
        name, value = self._checkpoints.last.name, float(scores[self._metric])
        best = BestRecord(checkpoint=name, metric=self._metric, value=value)

        def write() -> None:
            if self._mesh.rank == 0:
                write_best(self._checkpoints.directory, best)
                logger.info("%s is the best so far: %s %.5g", name, best.metric, value)

        self._mesh.agree(write, (OSError,))


def _check(metric: str | None, metrics: Mapping[str, str]) -> None:
    if metric is not None and metric not in metrics:
        raise ValueError(
            f"checkpoint.keep_best ({metric}) must be a score that this run writes: "
            f"{', '.join(metrics) or 'it writes none; set eval.data or eval.validation.shards'}"
        )

"""What a run has met in its data: counts by cause, broken shards, and when it is too much."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_linclip.data.loader import Batch
from ds_linclip.data.sample_reader import DataError, ShardProblem

__all__ = ["DataReport"]

logger = logging.getLogger(__name__)

# A share of fewer samples says nothing.
_MIN_SAMPLES_JUDGED = 1000


@dataclass
class Counts:
    """What one rank has met."""

    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[ShardProblem] = field(default_factory=list)


class DataReport:
    """Counts over all data ranks, from the first step of the run on.

    Every rank adds its batches; now and then the ranks exchange what they have (:meth:`take`,
    :meth:`merge`), after which all of them hold, and judge by, the same sums.

    Args:
        max_bad_samples: Largest share of samples that may be bad.
    """

    def __init__(self, max_bad_samples: float) -> None:
        self._max_bad_samples = max_bad_samples
        self._mine = Counts()
        self._samples = 0
        self._skipped: Counter[str] = Counter()
        self._shards: dict[tuple[str, str], ShardProblem] = {}

    def add(self, batch: Batch) -> None:
        """Count a batch of this rank."""
        self._mine.samples += len(batch.keys)
        self._mine.skipped.update(batch.skipped)
        self._mine.problems += batch.problems

    def take(self) -> Counts:
        """What this rank has counted since it was last asked; can be pickled."""
        mine, self._mine = self._mine, Counts()
        return mine

    def merge(self, ranks: Sequence[Counts]) -> None:
        """Add what all data ranks have taken."""
        for counts in ranks:
            self._samples += counts.samples
            self._skipped.update(counts.skipped)
            for problem in counts.problems:  # several workers may meet the same shard
                self._shards[problem.url, problem.cause] = problem

    def check(self) -> None:
        """Judge the sums.

        Raises:
            DataError: when more than ``data.max_bad_samples`` of the samples were bad.
        """
        bad = self._skipped.total()
        if bad > self._max_bad_samples * max(self._samples, _MIN_SAMPLES_JUDGED):
            causes = ", ".join(f"{cause} {count}" for cause, count in self._skipped.most_common())
            raise DataError(
                f"data.max_bad_samples ({self._max_bad_samples}) is exceeded: {bad} of "
                f"{self._samples} samples are bad ({causes})"
            )

    def scalars(self) -> dict[str, float]:
        """The counts, by TensorBoard tag."""
        causes = Counter(problem.cause for problem in self._shards.values())
        return {
            "data/skipped_samples": self._skipped.total(),
            "data/bad_shards": len({problem.url for problem in self._shards.values()}),
            **{f"data/skipped/{cause}": count for cause, count in sorted(self._skipped.items())},
            **{f"data/shards/{cause}": count for cause, count in sorted(causes.items())},
        }

    def state(self) -> dict[str, Any]:
        """The counts as plain data, for a checkpoint and for ``data_report.json``."""
        return {
            "samples": self._samples,
            "skipped_samples": self._skipped.total(),
            "skipped": dict(sorted(self._skipped.items())),
            "shards": [asdict(problem) for problem in self._shards.values()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._samples = state["samples"]
        self._skipped = Counter(state["skipped"])
        problems = [ShardProblem(**shard) for shard in state["shards"]]
        self._shards = {(problem.url, problem.cause): problem for problem in problems}

    def write(self, path: Path, **facts: Any) -> None:
        """Replace ``path`` with the counts and other facts, as JSON; a full disk is no error."""
        partial = path.with_suffix(".tmp")
        try:
            partial.write_text(json.dumps({**facts, **self.state()}, indent=1) + "\n")
            os.replace(partial, path)
        except OSError as error:
            logger.warning("%s not written: %s", path, error)

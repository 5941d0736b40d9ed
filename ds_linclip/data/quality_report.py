"""Report of bad data in a run: counts by cause, broken shards, and the limit that ends the run."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_linclip.data.loader import Batch
from ds_linclip.data.sample_reader import DataError, ShardProblem
from ds_linclip.data.tally import Tally
from ds_linclip.process.atomic import write_atomically

__all__ = ["DataReport"]

logger = logging.getLogger(__name__)

# A fraction of fewer samples is not significant.
_MIN_SAMPLES = 1000


@dataclass
class DataCounts:
    """Counts of one rank since it was last read."""

    samples: int = 0
    skipped: Tally = field(default_factory=Tally)
    problems: list[ShardProblem] = field(default_factory=list)
    captions: Tally = field(default_factory=Tally)  # passed over


class DataReport:
    """Counts over all data-parallel ranks since the start of the run.

    Every rank adds its own batches. From time to time the ranks exchange their counts
    (:meth:`take`, :meth:`merge`); then all have the same sums and the same :meth:`check`.

    Args:
        max_bad_samples: Largest fraction of bad samples.
    """

    def __init__(self, max_bad_samples: float) -> None:
        self._max_bad_samples = max_bad_samples
        self._own = DataCounts()
        self._samples = 0
        self._skipped = Tally()
        self._captions = Tally()
        self._shards: dict[tuple[str, str], ShardProblem] = {}

    def add(self, batch: Batch) -> None:
        """Count a batch of this rank."""
        self._own.samples += len(batch.keys)
        self._own.skipped.merge(batch.skipped)
        self._own.problems += batch.problems
        self._own.captions.merge(batch.captions_passed_over)

    def take(self) -> DataCounts:
        """Return this rank's counts since the last call, and start again from zero."""
        own, self._own = self._own, DataCounts()
        return own

    def merge(self, ranks: Sequence[DataCounts]) -> None:
        """Add the counts of all data-parallel ranks."""
        for counts in ranks:
            self._samples += counts.samples
            self._skipped.merge(counts.skipped)
            self._captions.merge(counts.captions)
            for problem in counts.problems:  # several workers may meet the same shard
                self._shards[problem.url, problem.cause] = problem

    def check(self) -> None:
        """Check the limit of bad samples.

        Raises:
            DataError: when more than ``data.max_bad_samples`` of the samples were bad.
        """
        bad = self._skipped.total()
        if bad > self._max_bad_samples * max(self._samples, _MIN_SAMPLES):
            raise DataError(
                f"data.max_bad_samples ({self._max_bad_samples}) is exceeded: {bad} of "
                f"{self._samples} samples are bad: {self._skipped}"
            )

    def scalars(self) -> dict[str, float]:
        """Return the counts by TensorBoard tag."""
        bad = [problem for problem in self._shards.values() if not problem.is_of_members]
        causes = Counter(problem.cause for problem in bad)
        return {
            "data/skipped_samples": self._skipped.total(),
            "data/bad_shards": len({problem.url for problem in bad}),
            **{f"data/skipped/{cause}": count for cause, count in sorted(self._skipped.items())},
            **{f"data/shards/{cause}": count for cause, count in sorted(causes.items())},
            **{f"data/captions/{cause}": count for cause, count in sorted(self._captions.items())},
        }

    def describe(self) -> list[str]:
        """Return a line for each cause of what was replaced, damaged or passed over."""
        shards, members = Tally(), Tally()
        for problem in self._shards.values():
            url, found = problem.url, problem.found
            if problem.is_of_members:
                members.add(problem.cause, f"{problem.first} of {url}", found)
            else:
                example = f"{url}: {found} found, {problem.expected} expected"
                shards.add(problem.cause, example)
        counts = {
            f"bad samples of {self._samples}, replaced": self._skipped,
            f"captions of {self._samples}, another one taken": self._captions,
            "shards": shards,
            "members, passed over": members,
        }
        return [f"{what}: {line}" for what, tally in counts.items() for line in tally.describe()]

    def state(self) -> dict[str, Any]:
        """Return the counts as plain data, for a checkpoint and for ``data_report.json``."""
        return {
            "samples": self._samples,
            "skipped_samples": self._skipped.total(),
            "skipped": dict(sorted(self._skipped.items())),
            "first_skipped": dict(sorted(self._skipped.examples.items())),
            "captions_passed_over": dict(sorted(self._captions.items())),
            "first_captions_passed_over": dict(sorted(self._captions.examples.items())),
            "shards": [asdict(problem) for problem in self._shards.values()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        self._samples = state["samples"]
        # Checkpoints of 0.2 have no examples.
        self._skipped = Tally(state["skipped"], state.get("first_skipped"))
        # Those of 0.2 have one caption per sample.
        captions = state.get("captions_passed_over"), state.get("first_captions_passed_over")
        self._captions = Tally(*captions)
        problems = [ShardProblem(**shard) for shard in state["shards"]]
        self._shards = {(problem.url, problem.cause): problem for problem in problems}

    def write(self, path: Path, **facts: Any) -> None:
        """Write the counts and other facts as JSON; log a warning if that fails."""
        try:
            write_atomically(path, json.dumps({**facts, **self.state()}, indent=1) + "\n")
        except OSError as error:
            logger.warning("%s not written: %s", path, error)

"""Counts by cause of what is bad or passed over, each with an example."""

from collections import Counter
from collections.abc import Mapping

from ds_linclip.data.causes import explain, printable

__all__ = ["Tally"]

_MAX_CAUSES = 12  # in a text


class Tally(Counter[str]):
    """Counts by cause, with the first example of each cause that was added with one."""

    def __init__(
        self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(counts)
        self.examples = dict(examples or {})

    def __reduce__(self) -> tuple[type["Tally"], tuple[dict[str, int], dict[str, str]]]:
        return Tally, (dict(self), self.examples)

    def add(self, cause: str, example: str, count: int = 1) -> None:
        self[cause] += count
        self.examples.setdefault(cause, example)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally, and its examples of causes that have none here."""
        self.update(other)
        self.examples = self.examples | other.examples | self.examples  # in order

    def rows(self) -> list[tuple[str, int]]:
        """Return causes and counts, the most frequent causes first."""
        return sorted(self.items(), key=lambda item: (-item[1], item[0]))

    def lines(self) -> list[str]:
        """Return a table of the most frequent causes, their counts and examples."""
        rows = self.rows()
        lines = [
            f"    {printable(cause):24} {count:10}  {printable(self.examples[cause])}".rstrip()
            for cause, count in rows[:_MAX_CAUSES]
        ]
        if rest := rows[_MAX_CAUSES:]:
            lines.append(f"    {f'{len(rest)} others':24} {sum(count for _, count in rest):10}")
        return lines

    def describe(self) -> list[str]:
        """Return ``cause (its meaning): 3 (example, ...)`` for each cause."""
        return [
            f"{explain(printable(cause))}: {count} "
            f"({printable(self.examples.get(cause, 'unknown'))}{', ...' * (count > 1)})"
            for cause, count in self.rows()
        ]

    def __str__(self) -> str:
        """Return the most frequent causes as one line."""
        return "; ".join(self.describe()[:_MAX_CAUSES])

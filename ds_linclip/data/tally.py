"""Counts by cause of what did not become a sample, each with an example."""

from collections import Counter

__all__ = ["Tally", "printable"]

_MAX_CAUSES = 12  # in a text


class Tally(Counter[str]):
    """Counts by cause, with the first example of each cause that was added with one."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def add(self, cause: str, example: str) -> None:
        self[cause] += 1
        self.examples.setdefault(cause, example)

    def lines(self) -> list[str]:
        """Return a table of causes, counts and examples, the most frequent causes first."""
        rows = sorted(self.items(), key=lambda item: (-item[1], item[0]))
        lines = [
            f"    {printable(cause):24} {count:10}  {printable(self.examples[cause])}".rstrip()
            for cause, count in rows[:_MAX_CAUSES]
        ]
        if rest := rows[_MAX_CAUSES:]:
            lines.append(f"    {f'{len(rest)} others':24} {sum(count for _, count in rest):10}")
        return lines

    def __str__(self) -> str:
        """Return the table as one line: ``cause: 3 (such as example), ...``."""
        return ", ".join(
            f"{printable(cause)}: {count} (such as {printable(self.examples[cause])})"
            for cause, count in self.most_common(_MAX_CAUSES)
        )


def printable(text: str) -> str:
    """Return a text with escapes for line ends, other control characters and bytes of no text."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )

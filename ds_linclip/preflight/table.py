"""One table: a row per check, with what was found where and what a person must mend."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ds_linclip.process.exit_codes import ExitCode

__all__ = ["Problem", "Row", "Table"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to mend, or with ``is_warning`` to know of.

    Attributes:
        host: Where.
        found: The value.
        rule: What it must be.
        remedy: What to do.
    """

    host: str
    found: str
    rule: str
    remedy: str
    is_warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A check.

    Attributes:
        check: Its name.
        found: What is where, in words.
        problems: Empty when all is right.
        figures: The numbers behind it.
        is_checked: False where an earlier failure stood in the way.
    """

    check: str
    found: str
    problems: Sequence[Problem] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    is_checked: bool = True

    @property
    def verdict(self) -> Literal["ok", "warning", "FAILURE", "not checked"]:
        if not self.is_checked:
            return "not checked"
        if not self.problems:
            return "ok"
        return "warning" if all(each.is_warning for each in self.problems) else "FAILURE"


class Table:
    """Rows in the order of the checks.

    Args:
        hosts: Name of every rank's host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self.rows: list[Row] = []

    @property
    def exit_code(self) -> ExitCode:
        failed = any(row.verdict in ("FAILURE", "not checked") for row in self.rows)
        return ExitCode.USER_ERROR if failed else ExitCode.FINISHED

    def text(self) -> str:
        """As Markdown, problems and verdict below."""
        cells = [("check", "verdict", "found")]
        cells += [(row.check, row.verdict, row.found) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
        lines = [f"| {a:<{widths[0]}} | {b:<{widths[1]}} | {c}" for a, b, c in cells]
        lines.insert(1, f"|:{'-' * (widths[0] + 1)}|:{'-' * (widths[1] + 1)}|:---")
        for row in self.rows:
            lines += _problems(row)
        return "\n".join([*lines, "", self._summary()])

    def json(self) -> str:
        """Everything, numbers included."""
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        summary = {"exit_code": int(self.exit_code), "summary": self._summary()}
        return json.dumps(summary | {"hosts": list(self._hosts), "rows": rows}, indent=1)

    def _summary(self) -> str:
        verdicts = [row.verdict for row in self.rows]
        counts = [
            f"{verdicts.count(each)} {name}"
            for each, name in (("FAILURE", "failed"), ("warning", "with warnings"))
            if each in verdicts
        ]
        found = f"of {len(verdicts)} checks {' and '.join(counts) or 'all are right'}"
        if self.exit_code == ExitCode.FINISHED:
            return f"verdict: ready to train ({found})"
        return f"verdict: NOT ready ({found}); mend what failed and run this again"

    def add(
        self,
        check: str,
        found: str,
        problems: Sequence[Problem],
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """A row; ``found`` may be empty where there are problems."""
        if not found:
            found = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, see below"
        self.rows.append(Row(check=check, found=found, problems=problems, figures=figures or {}))

    def fail(self, check: str, found: str, rule: str, remedy: str, host: str = "all hosts") -> None:
        """A row for something that has failed as a whole."""
        problem = Problem(host=host, found=found, rule=rule, remedy=remedy)
        self.rows.append(Row(check=check, found=found, problems=[problem]))

    def skip(self, *checks: str, why: str) -> None:
        """Rows for what could not be looked at."""
        self.rows += [Row(check=check, found=why, is_checked=False) for check in checks]


def _problems(row: Row) -> list[str]:
    """Those with one rule together."""
    found: dict[tuple[bool, str, str], list[str]] = {}
    for each in row.problems:
        kind = each.is_warning, each.rule, each.remedy
        found.setdefault(kind, []).append(f"  {each.host}: {each.found}")
    lines = []
    for (is_warning, rule, remedy), hosts in found.items():
        title = f"{'warning' if is_warning else 'FAILURE'}, {row.check}: {rule}"
        lines += ["", title, *hosts, f"  remedy: {remedy}"]
    return lines

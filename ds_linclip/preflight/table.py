"""One table of all checks: a row per check, with what was found and how to fix it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ds_linclip.process.exit_codes import ExitCode

__all__ = [
    "CheckResult",
    "Problem",
    "exit_code_of",
    "format_json",
    "format_table",
    "problems_if",
    "skipped",
]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A rule that some hosts break: a person must fix it or, with ``is_warning``, should know it.

    Attributes:
        rule: The condition that must hold.
        remedy: The way to fix it.
        found: Pairs of a host, or several, and what was found there.
        is_warning: Whether training can start all the same.
    """

    rule: str
    remedy: str
    found: Sequence[tuple[str, str]]
    is_warning: bool = False


def problems_if(
    found: Sequence[tuple[str, str]], rule: str, remedy: str, *, is_warning: bool = False
) -> list[Problem]:
    """Return a problem where there are hosts that break the rule, else nothing."""
    return [Problem(rule=rule, remedy=remedy, found=found, is_warning=is_warning)] if found else []


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """A row of the table.

    Attributes:
        check: The name of the check.
        found: The values found, in words; may be empty where there are problems.
        problems: Empty when all is right.
        figures: The numbers behind ``found``.
        is_checked: False where an earlier failure made the check impossible.
    """

    check: str
    found: str = ""
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


def skipped(reason: str, *checks: str) -> list[CheckResult]:
    """Return rows for checks that an earlier failure makes impossible."""
    return [CheckResult(check=check, found=reason, is_checked=False) for check in checks]


def exit_code_of(results: Sequence[CheckResult]) -> ExitCode:
    """Return FINISHED when training can start, else USER_ERROR."""
    failed = any(result.verdict in ("FAILURE", "not checked") for result in results)
    return ExitCode.USER_ERROR if failed else ExitCode.FINISHED


def format_table(results: Sequence[CheckResult]) -> str:
    """Return the results as a Markdown table, with the problems and a summary below it."""
    rows = ((each.check, each.verdict, each.found or "see below") for each in results)
    cells = [("check", "verdict", "found"), *rows]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    lines = [f"| {a:<{widths[0]}} | {b:<{widths[1]}} | {c}" for a, b, c in cells]
    lines.insert(1, f"|:{'-' * (widths[0] + 1)}|:{'-' * (widths[1] + 1)}|:---")
    for result in results:
        for problem in result.problems:
            kind = "warning" if problem.is_warning else "FAILURE"
            lines += ["", f"{kind}, {result.check}: {problem.rule}"]
            lines += [f"  {host}: {found}" for host, found in problem.found]
            lines.append(f"  remedy: {problem.remedy}")
    return "\n".join([*lines, "", _summary(results)])


def format_json(results: Sequence[CheckResult], hosts: Sequence[str]) -> str:
    """Return the results with all their numbers as JSON; ``hosts`` is the host of every rank."""
    rows = [asdict(result) | {"verdict": result.verdict} for result in results]
    summary = {"exit_code": int(exit_code_of(results)), "summary": _summary(results)}
    return json.dumps(summary | {"hosts": list(hosts), "rows": rows}, indent=1)


def _summary(results: Sequence[CheckResult]) -> str:
    verdicts = [result.verdict for result in results]
    names = {"FAILURE": "failed", "warning": "with warnings"}
    counts = [f"{verdicts.count(v)} {name}" for v, name in names.items() if v in verdicts]
    found = f"{len(verdicts)} checks: {', '.join(counts) or 'all ok'}"
    if exit_code_of(results) == ExitCode.FINISHED:
        return f"verdict: ready to train ({found})"
    return f"verdict: NOT ready ({found}); fix what failed and run this again"

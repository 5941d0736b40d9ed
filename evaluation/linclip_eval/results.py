"""The one writer of results: a summary for people, tables and numbers for programs, pictures.

Everything below ``docs/results`` is written here, so that every result names its device, versions,
commit, date and command in the same way.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import binomtest

from ds_linclip.process.atomic import atomic_file, write_atomically
from linclip_eval.plotting import add_caption

__all__ = ["markdown_table", "percent", "wilson_interval", "write_report"]

#: Characters that Markdown gives a meaning inside a line.
_MARKUP = re.compile(r"([\\|*_\[\]`])")


def write_report(
    folder: Path,
    *,
    title: str,
    sections: Sequence[str],
    facts: Mapping[str, str],
    tables: Mapping[str, Sequence[Any]] | None = None,
    table_facts: Sequence[str] = (),
    float_format: str = ".6g",
    figures: Mapping[str, Figure] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> str:
    """Write ``summary.md`` and what it rests on; every file appears whole or not at all.

    Args:
        folder: Created where it is missing.
        title: Heading of the summary; the pictures are captioned with it.
        sections: The summary below the title, Markdown, with links to the pictures; empty ones are
            left out.
        facts: The result of :func:`ds_linclip.provenance.run_facts`, and further conditions.
        tables: File name -> rows of a CSV file: dataclasses or mappings with the same fields, or
            tuples, of which the first is the header.
        table_facts: Facts that every row of the tables repeats.
        float_format: Format of floats in tables; an empty one keeps every digit.
        figures: File name -> picture.
        numbers: Content of ``results.json`` beside title and facts; not written without them.

    Returns:
        The text of the summary.

    Raises:
        OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (tables or {}).items():
        repeated = {key: facts[key] for key in table_facts}
        write_atomically(folder / name, _to_csv(rows, repeated, float_format))
    origin = ", ".join(
        value if name in ("device", "date_utc") else f"{name} {value}"
        for name, value in facts.items()
        if name != "command"
    )
    for name, figure in (figures or {}).items():
        caption = [facts[key] for key in ("device", "date_utc", "commit")]
        add_caption(figure, f"{title}: {', '.join(caption)}")
        with atomic_file(folder / name) as partial:
            figure.savefig(partial, format=Path(name).suffix[1:])
    if numbers is not None:
        content = json.dumps({"title": title, **facts, **numbers}, indent=1)
        write_atomically(folder / "results.json", content + "\n")
    body = "\n\n".join(section.strip() for section in sections if section)
    summary = f"# {title}\n\n{body}\n\n{origin}: `{facts['command']}`\n"
    write_atomically(folder / "summary.md", summary)
    return summary


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = ""
) -> str:
    """Return a Markdown table with escaped cells.

    ``align`` has "l" or "r" for each column; by default the first is to the left, the others right.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [header, [{"l": ":---", "r": "---:"}[side] for side in align], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``trials`` (Wilson's score interval)."""
    interval = binomtest(round(share * trials), trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def percent(share: float, trials: int | None = None) -> str:
    """Return a share in per cent; with the number of trials behind it, also its 95 % interval."""
    if trials is None:
        return f"{100 * share:.2f}"
    low, high = wilson_interval(share, trials)
    return f"{100 * share:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _to_csv(rows: Sequence[Any], facts: Mapping[str, str], float_format: str) -> str:
    header: Sequence[str] = ()
    if rows and isinstance(rows[0], tuple):
        header, *lines = rows
        rows = [dict(zip(header, line, strict=True)) for line in lines]
    records = [{**(row if isinstance(row, Mapping) else asdict(row)), **facts} for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]) if records else header)
    writer.writeheader()
    for record in records:
        writer.writerow(
            {k: format(v, float_format) if isinstance(v, float) else v for k, v in record.items()}
        )
    return text.getvalue()


def _cell(value: object) -> str:
    """Return a table's cell without mark-up: names of classes and captions come from anywhere."""
    return _MARKUP.sub(r"\\\1", " ".join(str(value).split()))

"""The writer of results: its files, and what each says about its origin."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from linclip_eval.plotting import new_figure
from linclip_eval.results import write_report

FACTS = {
    "device": "CPU of a test",
    "torch": "2.0",
    "cores": "2",
    "date_utc": "2026-01-02 03:04",
    "commit": "abc1234",
    "command": "python -m benchmarks.some_benchmark --quick",
}


@dataclass
class Row:
    name: str
    seconds: float | None
    calls: int


ROWS = [Row("a", 1 / 3, 9), Row("b", None, 0)]


def test_every_file_names_its_origin(tmp_path: Path):
    figure = new_figure(3, 2)
    summary = write_report(
        tmp_path / "new" / "folder",
        title="A benchmark",
        sections=["Words.", "![A picture](figure.png)"],
        facts=FACTS,
        tables={"table.csv": ROWS, "again.csv": [{"name": "c"}]},
        table_facts=("device", "commit"),
        figures={"figure.png": figure},
        numbers={"points": [1, 2]},
    )
    folder = tmp_path / "new" / "folder"
    assert summary == (folder / "summary.md").read_text()
    assert summary == (
        "# A benchmark\n\nWords.\n\n![A picture](figure.png)\n\n"
        "CPU of a test, torch 2.0, cores 2, 2026-01-02 03:04, commit abc1234: "
        "`python -m benchmarks.some_benchmark --quick`\n"
    )
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    origin = {"device": "CPU of a test", "commit": "abc1234"}
    assert rows == [
        {"name": "a", "seconds": "0.333333", "calls": "9", **origin},
        {"name": "b", "seconds": "", "calls": "0", **origin},
    ]
    with (folder / "again.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "c", **origin}]
    results = json.loads((folder / "results.json").read_text())
    assert results == {"title": "A benchmark", **FACTS, "points": [1, 2]}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    caption = "A benchmark: CPU of a test, 2026-01-02 03:04, abc1234"
    assert " ".join(figure.get_suptitle().split()) == caption
    assert not list(folder.glob(".*"))  # no partial file stays


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    common = {"title": "A benchmark", "sections": ["Words."], "facts": FACTS}
    write_report(tmp_path, **common, tables={"table.csv": ROWS}, numbers={"a": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report(tmp_path, **common, numbers={"a": object()})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

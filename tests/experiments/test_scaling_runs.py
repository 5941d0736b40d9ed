"""The runs behind the scaling laws: trained once and not mixed with others."""

import shutil
import sys

import pytest

from experiments import scaling_runs
from linclip_eval.scaling_laws.runs import check_comparable, read_run

SMALL = ("optim.warmup_steps=2", "--widths", "32", "--steps", "8", "--seeds", "1")


def launch(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling_runs.py", *arguments])
    return scaling_runs.main()


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    assert launch(monkeypatch, str(tmp_path), *SMALL) == 0
    folders = sorted((tmp_path / "runs").iterdir())
    runs = [read_run(folder) for folder in folders]
    assert [run.kind for run in runs] == ["linear", "softmax"]
    check_comparable(runs)
    kept, lost = folders
    started = (kept / "starts.jsonl").stat().st_mtime_ns
    shutil.rmtree(lost)
    assert launch(monkeypatch, str(tmp_path), *SMALL) == 0
    assert (kept / "starts.jsonl").stat().st_mtime_ns == started
    assert read_run(lost).loss == runs[1].loss
    capsys.readouterr()
    assert launch(monkeypatch, str(tmp_path), "optim.lr=1e-3", *SMALL) == 2
    assert "must be another folder" in capsys.readouterr().err
    assert (kept / "starts.jsonl").stat().st_mtime_ns == started

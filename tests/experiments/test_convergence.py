"""The convergence study: what it refuses before it trains."""

import json
from pathlib import Path

import pytest

from experiments import convergence


def test_a_folder_with_runs_of_another_design_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = {"variant": "Eq. 4", "seed": 0, "num_tokens": 65, "top1": 0.5, "top5": 0.9, "loss": 1.0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n")
    monkeypatch.setattr(convergence, "train_all", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr("sys.argv", ["convergence", str(tmp_path), "--design", "kinds"])
    assert convergence.main() == 2
    assert f"output ({tmp_path}) must be another folder" in capsys.readouterr().err

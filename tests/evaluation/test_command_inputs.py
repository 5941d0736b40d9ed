"""Command-line arguments that several evaluations share."""

import pytest

from linclip_eval.commands.inputs import parse_sources


def test_sources_are_labelled(tmp_path):
    run = tmp_path / "lr=0.1"
    run.mkdir()
    found = parse_sources(["a=runs/x", "runs/y", str(run)], "models")
    assert found == {"a": "runs/x", "y": "runs/y", "lr=0.1": str(run)}
    with pytest.raises(ValueError, match=r"models \(a/hub b/hub\) must have different labels"):
        parse_sources(["a/hub", "b/hub"], "models")

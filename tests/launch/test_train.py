"""How a rank of a training run ends."""

import sys

import pytest

from ds_linclip.process.consensus import AgreedCrash, AgreedError
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.resilience.divergence import Diverged
from ds_linclip.resilience.preemption import Preempted
from helpers import EMBEDDED
from linclip_launch import train


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AgreedError, ExitCode.USER_ERROR),
        (AgreedCrash, ExitCode.FAILED),
        (Diverged, ExitCode.DIVERGED),
        (Preempted, ExitCode.PREEMPTED),
    ],
)
def test_exit_code_tells_why_the_run_ended(monkeypatch, tmp_path, capsys, error, code):
    def fail(*_):
        raise error("the reason; step 7 is saved")

    monkeypatch.setattr(train, "train", fail)
    overrides = ["data.train=[no.tar]", "eval.data=null", f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train", str(EMBEDDED), *overrides])
    assert train.main() == code
    assert "the reason; step 7 is saved" in capsys.readouterr().err

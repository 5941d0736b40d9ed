"""Bars are redrawn on a terminal, and are a few lines in a file."""

import io
import sys

import pytest

from ds_linclip.process import progress as module
from ds_linclip.process.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_file_gets_the_first_and_the_last_line(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress(range(20_000), desc="images")) == list(range(20_000))
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("images:   0%")
    assert lines[1].startswith("images: 100%")
    assert "20000/20000" in lines[1]
    assert "\r" not in log.getvalue()


def test_file_gets_a_line_per_interval(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0.0)
    assert len(list(progress(range(5)))) == 5
    assert len(log.getvalue().splitlines()) >= 5


@pytest.mark.parametrize("leave", [True, False])
def test_terminal_is_redrawn(monkeypatch, leave):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(5), mininterval=0, leave=leave))
    assert terminal.getvalue().count("\r") >= 5
    assert terminal.getvalue().count("\n") == leave

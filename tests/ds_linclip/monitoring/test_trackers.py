"""Experiment trackers, in the place of which stands a module without a network."""

import sys
from types import SimpleNamespace

import pytest

from ds_linclip.config import load_config
from ds_linclip.monitoring.trackers import wandb_run
from helpers import EMBEDDED


def test_folder_that_wandb_cannot_write_is_an_error(tmp_path, monkeypatch):
    settings = SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    module = SimpleNamespace(Error=RuntimeError, setup=lambda: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = load_config(EMBEDDED, [f"output_dir={tmp_path}", "name=run", "log.wandb=p"])
    config.run_dir.mkdir()
    (config.run_dir / "wandb").touch()
    with (
        pytest.raises(ValueError, match=r"log\.wandb \(p\) cannot be used: .*File exists: .*wandb"),
        wandb_run(config),
    ):
        pass

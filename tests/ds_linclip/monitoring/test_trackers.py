"""Experiment trackers, in the place of which stands a module without a network."""

import sys
from types import SimpleNamespace

import pytest

from ds_linclip.config import load_config
from ds_linclip.monitoring.trackers import trackio_run, wandb_run
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.run_dir import RunFolder
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


class Recorder:
    """Stands in the place of wandb or trackio, and records how runs are opened."""

    Error = RuntimeError

    def __init__(self) -> None:
        self.opened: list[dict] = []
        self.logged: list[tuple[int, dict]] = []

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode="offline"))

    def init(self, **settings) -> SimpleNamespace:
        self.opened.append(settings)
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda exit_code=0: None)


@pytest.mark.parametrize(("name", "open_run"), [("wandb", wandb_run), ("trackio", trackio_run)])
def test_all_starts_are_one_run(name, open_run, tmp_path, monkeypatch):
    module = Recorder()
    monkeypatch.setitem(sys.modules, name, module)
    for run in ("first", "other"):
        config = load_config(EMBEDDED, [f"output_dir={tmp_path}", f"name={run}", f"log.{name}=p"])
        config.run_dir.mkdir()
        for start in range(2):
            with open_run(config) as sink:
                sink(start, {"train/loss": 1.0})
    assert [step for step, _ in module.logged] == [0, 1, 0, 1]
    assert [settings["name"] for settings in module.opened] == ["first", "first", "other", "other"]
    if name == "wandb":
        ids = [settings["id"] for settings in module.opened]
        assert ids[0] == ids[1] != ids[2] == ids[3]
        assert {settings["resume"] for settings in module.opened} == {"allow"}
    else:
        resume = [settings["resume"] for settings in module.opened]
        assert resume == ["never", "allow", "never", "allow"]


def test_folder_with_only_a_tracker_id_is_that_of_an_interrupted_start(tmp_path):
    config = load_config(EMBEDDED, [f"output_dir={tmp_path}", "name=run"])
    config.run_dir.mkdir()
    (config.run_dir / "tracker_id").write_text("abc")
    with RunFolder.hold(config, Mesh.create()):
        pass

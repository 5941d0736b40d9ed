"""The checks of the run folder at a start of training."""

import shutil
from types import SimpleNamespace

import pytest

from ds_linclip.config import load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.preflight.node_checks import checkpoint_size, disk_space
from ds_linclip.preflight.shared_folder import check_run_folder
from ds_linclip.process.consensus import AgreedError
from helpers import EMBEDDED


def config_of(folder, *overrides):
    return load_config(EMBEDDED, [f"output_dir={folder}", "name=run", *overrides])


def test_folder_with_room_is_left_as_it_was(tmp_path):
    check_run_folder(config_of(tmp_path), Mesh.create())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_room_for_a_checkpoint_is_needed(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    needed = checkpoint_size(config)
    assert disk_space(config)["checkpoints"]["needed"] == 2 * needed  # 800 steps, saved every 400
    for free, is_enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if is_enough:
            check_run_folder(config, Mesh.create())
            continue
        with pytest.raises(
            AgreedError, match=r"checkpoints must have room for a checkpoint of .* G"
        ):
            check_run_folder(config, Mesh.create())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_frozen_tower_has_no_optimizer_state(tmp_path):
    frozen = config_of(tmp_path, "init.lock_image=true", "init.pretrained_image=x")
    assert checkpoint_size(frozen) == checkpoint_size(config_of(tmp_path)) / 3
    frozen.train.precision = "bf16"
    assert checkpoint_size(frozen) == checkpoint_size(config_of(tmp_path)) / 6


def test_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(AgreedError, match=r"checkpoints cannot be written: .*Not a directory"):
        check_run_folder(config_of(tmp_path), Mesh.create())

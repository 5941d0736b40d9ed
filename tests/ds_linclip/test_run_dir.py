"""The run folder: the lock, the check of its content, and the record of every start."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ds_linclip import run_dir
from ds_linclip.config import Config, load_config
from ds_linclip.monitoring.metrics import MetricWriter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.run_dir import RunFolder

EMBEDDED = "ds_configs/train/embedded.yaml"


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(EMBEDDED, [f"output_dir={tmp_path}", "name=run"])


def content(folder) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def hold_until_killed(config: Config, ready: Connection) -> None:
    """Hold the folder in a process with a child that outlives it."""
    with RunFolder.hold(config, Mesh.create()) as folder:
        folder.record_start(None)
        worker = os.fork()
        if worker:
            ready.send(worker)
        time.sleep(60)


@pytest.mark.faults
def test_second_run_is_refused_until_the_first_is_killed(config, monkeypatch, caplog):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ds_linclip.trainer"])
    ready, theirs = server.Pipe()
    first = server.Process(target=hold_until_killed, args=(config, theirs), daemon=True)
    first.start()
    assert ready.poll(60)
    worker = ready.recv()
    try:
        before = content(config.run_dir)
        with (
            pytest.raises(AgreedError) as refused,
            RunFolder.hold(config, Mesh.create()),
        ):
            pass
        assert content(config.run_dir) == before
        message = str(refused.value)
        assert message.startswith(f"run folder ({config.run_dir}) is in use by host ")
        assert f"pid {first.pid}, user " in message
        assert message.endswith("stop that run, or choose another name or output_dir")
        assert "\n" not in message
        # A run of another host may be dead: its lock is waited for.
        (config.run_dir / "lock").write_text("host elsewhere, pid 1, user ada, since yesterday")
        monkeypatch.setattr(run_dir, "_LEASE", 1.5)
        with pytest.raises(AgreedError, match="in use by host elsewhere, pid 1"):
            RunFolder.hold(config, Mesh.create()).__enter__()
        assert "waiting 2 s for host elsewhere, pid 1" in caplog.text
        monkeypatch.setattr(run_dir, "_LEASE", 60.0)
        threading.Timer(1.5, os.kill, [first.pid, signal.SIGKILL]).start()
        with RunFolder.hold(config, Mesh.create()):
            first.join()
            os.kill(worker, 0)  # its worker is still there
            assert f"pid {os.getpid()}," in (config.run_dir / "lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        first.kill()


def test_run_that_fails_releases_its_folder(config):
    with pytest.raises(KeyError), RunFolder.hold(config, Mesh.create()):
        raise KeyError
    read, write = os.pipe()
    if (other := os.fork()) == 0:  # locks are between processes
        with (config.run_dir / "lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(write, b"taken")
            os._exit(0)
    os.close(write)
    os.waitpid(other, 0)
    assert os.read(read, 5) == b"taken"
    os.close(read)


def test_file_system_without_locks_is_logged(config, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_dir.fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), RunFolder.hold(config, Mesh.create()):
        assert "cannot be locked here (No locks available)" in caplog.text


def test_folder_of_something_else_is_refused(config):
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("all of it")
    before = content(config.run_dir)
    with (
        pytest.raises(AgreedError, match=r"holds files of something else \(thesis\.tex\): choose"),
        RunFolder.hold(config, Mesh.create()),
    ):
        pass
    assert content(config.run_dir) == before


@pytest.mark.parametrize(
    "name", ["slurm-17.out", "lock", "hostfile", "config.yaml", "checkpoints/latest"]
)
def test_folder_of_a_run_or_with_its_logs_is_accepted(config, name):
    path = config.run_dir / name
    path.parent.mkdir(parents=True)
    path.touch()
    with RunFolder.hold(config, Mesh.create()):
        pass


def test_folder_that_cannot_be_created_is_named(config, tmp_path):
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(AgreedError, match=r"run folder \(.*run\) is a file: choose another name"),
        RunFolder.hold(config, Mesh.create()),
    ):
        pass
    below = load_config(EMBEDDED, [f"output_dir={tmp_path}/run/below"])
    with (
        pytest.raises(AgreedError, match=r"output_dir \(.*below\) cannot be written: .*Not a dir"),
        RunFolder.hold(below, Mesh.create()),
    ):
        pass


@pytest.mark.faults
def test_full_disk_at_the_start_is_named(config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "starts.jsonl")

    monkeypatch.setattr(run_dir, "_append", full)
    with (
        RunFolder.hold(config, Mesh.create()) as folder,
        pytest.raises(AgreedError, match=r"output_dir \(.*\) cannot be written: .*No space left"),
    ):
        folder.record_start(None)


def test_every_start_is_recorded(config, caplog):
    starts = config.run_dir / "starts.jsonl"
    with RunFolder.hold(config, Mesh.create()) as folder:
        folder.record_start(None)
        first = json.loads(starts.read_text())
        starts.write_text(json.dumps(first | {"deepspeed": "0.1"}) + '\n{"torn')
        checkpoint = config.run_dir / "checkpoints" / "step-00000004"
        with caplog.at_level(logging.WARNING):
            folder.record_start(checkpoint)
    lines = starts.read_text().splitlines()
    again = json.loads(lines[2])
    assert len(lines) == 3
    assert (first["resumed_from"], again["resumed_from"]) == (None, "step-00000004")
    assert first["world_size"] == 1
    assert first["layout"] == {"dp": 1, "tp": 1, "pp": 1, "cp": 1}
    assert first["config"]["optim"]["lr"] == config.optim.lr
    assert first["torch"]
    assert sum(first["hosts"].values()) == 1
    assert f"deepspeed 0.1 -> {first['deepspeed']}): losses may differ" in caplog.text
    assert "torch" not in caplog.text
    assert load_config(config.run_dir / "config.yaml") == config


def test_metrics_have_every_step_once(config):
    config.run_dir.mkdir()
    path = config.run_dir / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n{"step": 4, "t')
    writer = MetricWriter(config, Mesh.create(), None)
    writer.cut_back(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n'
    assert (config.run_dir / "metrics_undone.jsonl").read_text() == '{"step": 3}\n'
    writer.cut_back(2)
    assert len(path.read_text().splitlines()) == 3


class Board:
    """The part of DeepSpeed's monitor that MetricWriter uses."""

    def __init__(self, folder: Path) -> None:
        self.tb_monitor = SimpleNamespace(summary_writer=SummaryWriter(str(folder)))

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        for event in events:
            self.tb_monitor.summary_writer.add_scalar(*event)
        self.tb_monitor.summary_writer.flush()


def test_tensorboard_hides_points_that_are_repeated(config):
    folder = config.run_dir / "tensorboard"
    for start, value in ((0, 1.0), (2, 2.0)):
        writer = MetricWriter(config, Mesh.create(), Board(folder))
        writer.cut_back(start)
        for step in range(start + 1, 5):
            writer.scalars(step, {"train/loss": value})
        time.sleep(1.1)  # event files are named by the second
    board = EventAccumulator(str(folder))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]

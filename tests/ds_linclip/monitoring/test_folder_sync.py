"""Copies of a run folder in another place: what is there, what is not, and what fails."""

import logging

import boto3
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from ds_linclip.config import Config, load_config
from ds_linclip.monitoring.folder_sync import FolderSync
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from ds_linclip.trainer import train
from helpers import EMBEDDED

PLACE = "memory://copies"


@pytest.fixture(autouse=True)
def memory():
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def config_of(output, overrides, *more) -> Config:
    small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
    short = ["train.steps=4", "optim.warmup_steps=1", "data.num_workers=0", "eval.data=null"]
    rest = ["checkpoint.every_steps=2", f"output_dir={output}", "name=run", f"log.sync_to={PLACE}"]
    return load_config(EMBEDDED, [*overrides, *small, *short, *rest, *more])


def copied(memory) -> dict[str, bytes]:
    found = memory.find("/copies/run")
    return {path.removeprefix("/copies/run/"): memory.cat_file(path) for path in found}


def test_all_of_a_finished_run_is_copied(embedded_overrides, tmp_path, memory, caplog):
    config = config_of(tmp_path, embedded_overrides)
    with caplog.at_level(logging.INFO):
        train(config, Mesh.create())
    there = copied(memory)
    here = {
        path.relative_to(config.run_dir).as_posix(): path.read_bytes()
        for path in config.run_dir.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    assert there.pop("copied_from") == f"{config.run_dir}\n".encode()
    assert there == here
    assert "checkpoints/step-00000004/manifest.json" in there
    assert "the copy in memory://copies/run is complete" in caplog.text


def test_only_complete_checkpoints_are_copied_and_once(embedded_overrides, tmp_path, memory):
    config = config_of(tmp_path, embedded_overrides)
    for name, content in {
        "checkpoints/step-00000002/manifest.json": "{}",
        "checkpoints/step-00000002/rank-00000.safetensors": "x",
        "checkpoints/step-00000004.tmp/rank-00000.safetensors": "x",
        "checkpoints/step-00000006.rejected/rank-00000.safetensors": "x",
        "checkpoints/latest": "step-00000002",
        "metrics.jsonl": "{}",
        "lock": "x",
    }.items():
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.run_dir / name).write_text(content)
    order = []
    sync = FolderSync(config)
    put_file = sync._files.put_file
    sync._files.put_file = lambda path, target: (order.append(target), put_file(path, target))
    assert sync.copy(lambda: None)
    assert [path.removeprefix("/copies/run/") for path in order] == [
        *("checkpoints/step-00000002/rank-00000.safetensors",),
        *("checkpoints/step-00000002/manifest.json", "metrics.jsonl", "checkpoints/latest"),
    ]
    order.clear()
    assert sync.copy(lambda: None)
    assert order == []
    (config.run_dir / "metrics.jsonl").write_text("{}{}")
    assert sync.copy(lambda: None)
    assert [path.rpartition("/")[2] for path in order] == ["metrics.jsonl"]
    later = FolderSync(config)  # of another start: checkpoints that are there stay as they are
    assert later.copy(lambda: None)
    assert later.files == 2


def test_failures_are_counted_and_the_run_goes_on(
    embedded_overrides, tmp_path, memory, caplog, monkeypatch
):
    def fail(self, path, target, **options):
        raise OSError(f"no room for {target}")

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    config = config_of(tmp_path, embedded_overrides)
    assert train(config, Mesh.create()).steps == 4
    assert "not copied: OSError: no room for /copies/run/checkpoints/step-0000000" in caplog.text
    assert "the copy in memory://copies/run is NOT complete" in caplog.text
    assert ", 1 failures" in caplog.text
    monkeypatch.undo()
    train(config, Mesh.create())  # a later start copies what is not there
    assert "checkpoints/step-00000004/manifest.json" in copied(memory)


def test_place_that_cannot_be_written_is_refused_before_the_start(embedded_overrides, tmp_path):
    config = config_of(tmp_path, embedded_overrides, "log.sync_to=nowhere://me:secret@bucket")
    with pytest.raises(
        AgreedError, match=r"log\.sync_to \(nowhere://bucket\) must be a place"
    ) as e:
        train(config, Mesh.create())
    assert "secret" not in str(e.value)
    assert not (config.run_dir / "config.yaml").exists()


def test_copy_on_s3(embedded_overrides, tmp_path, monkeypatch):
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="copies")
    config = config_of(tmp_path, embedded_overrides, "log.sync_to=s3://copies/runs")
    (config.run_dir / "checkpoints" / "step-00000002").mkdir(parents=True)
    for name in ("manifest.json", "rank-00000.safetensors"):
        (config.run_dir / "checkpoints" / "step-00000002" / name).write_text(name)
    try:
        first, later = FolderSync(config), FolderSync(config)
        assert first.copy(lambda: None)
        assert later.copy(lambda: None)
        found = boto3.client("s3").list_objects_v2(Bucket="copies")["Contents"]
    finally:
        server.stop()
    assert (first.files, later.files) == (2, 0)
    assert [each["Key"] for each in found] == [
        "runs/run/checkpoints/step-00000002/manifest.json",
        "runs/run/checkpoints/step-00000002/rank-00000.safetensors",
        "runs/run/copied_from",
    ]

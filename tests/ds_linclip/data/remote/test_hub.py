"""Shards on the Hugging Face Hub, from a server that answers as the Hub does."""

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ds_linclip.config import CacheConfig, Config, DataConfig, Source, TrainConfig
from ds_linclip.data import Storage, TrainData, find_shards
from ds_linclip.data.remote import check_url
from ds_linclip.data.remote.backends import RemoteNotFoundError
from helpers.hub_server import TOKEN, HubServer
from helpers.stored_content import content_of
from helpers.training_shards import NUM_SAMPLES, sound_samples, write_shards

ROOT = "hf://datasets/owner/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    write_shards(tmp_path / "hub", sound_samples())
    files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    server = HubServer(files)
    # HF_ENDPOINT is read when the package is imported.
    place = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + place)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_files_are_opened_and_read(hub: HubServer, storage: Storage) -> None:
    url = f"{ROOT}/data/00000.tar"
    check_url(url)
    assert content_of(storage, url) == hub.files["data/00000.tar"]
    assert content_of(storage, f"{ROOT}@main/data/00000.tar") == hub.files["data/00000.tar"]
    assert storage.read(f"{ROOT}/data/00000_stats.json") == hub.files["data/00000_stats.json"]
    assert storage.exists(url)


def test_absent_files_and_repositories_are_named(hub: HubServer, storage: Storage) -> None:
    for url in (f"{ROOT}/data/9.tar", f"{ROOT}/none/9.tar", "hf://datasets/owner/no/0.tar"):
        assert not storage.exists(url)
        assert storage.read(url) is None
        with pytest.raises(RemoteNotFoundError, match="HF_TOKEN"):
            storage.open(url)


def test_a_token_opens_what_is_private_and_is_never_logged(
    hub: HubServer,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.is_private = True
    url = f"{ROOT}/data/00001.tar"
    with pytest.raises(RemoteNotFoundError, match="HF_TOKEN"):
        storage.open(url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert content_of(storage, url) == hub.files["data/00001.tar"]
    assert TOKEN not in caplog.text


def test_failures_that_pass_are_retried(
    hub: HubServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.failures += [503, 500]
    assert content_of(storage, f"{ROOT}/data/00000.tar") == hub.files["data/00000.tar"]


def test_a_run_trains_on_them(hub: HubServer, tmp_path: Path) -> None:
    sources = [Source(shards=f"{ROOT}/data/{{00000..00003}}.tar")]
    config = Config(
        data=DataConfig(train=sources, num_workers=0, cache=CacheConfig(dir=str(tmp_path / "c"))),
        train=TrainConfig(global_batch_size=NUM_SAMPLES, steps=1),
    )
    storage = Storage(config.data.cache, config.data.network)
    data = TrainData(config, find_shards(sources, storage), dp_rank=0, dp_size=1)
    (batch,) = itertools.islice(data.batches(0), 1)
    assert sorted(batch.keys) == sorted(sound_samples())
    assert not batch.problems


def test_the_endpoint_and_the_token_come_from_the_environment(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.is_private = True
    done = subprocess.run(
        [
            *(sys.executable, "-m", "linclip_launch", "shards", "inspect"),
            *(f"{ROOT}/data/{{00000..00003}}.tar", "--out", str(tmp_path / "report")),
            *("--workers", "1", "--cache-dir", str(tmp_path / "cache")),
        ],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{NUM_SAMPLES} usable" in done.stdout
    written = "".join(path.read_text() for path in (tmp_path / "report").glob("*.json"))
    assert TOKEN not in done.stdout + done.stderr + written

"""A server that misbehaves, and a storage that reads from it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_linclip.data.remote import Storage
from helpers.misbehaving_server import MisbehavingServer
from helpers.stored_content import make_storage


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingServer]:
    """Start a server that answers as each test scripts it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with MisbehavingServer() as running:
        yield running
        running.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Return a storage with an empty cache of its own."""
    return make_storage(tmp_path)

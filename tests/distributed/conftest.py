"""Fixtures of tests on two hosts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.two_hosts import TwoHosts, two_hosts


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    folder = tmp_path / "hosts"
    folder.mkdir()
    with two_hosts(folder) as both:
        yield both

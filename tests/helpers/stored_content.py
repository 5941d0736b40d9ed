"""Contents of test servers, and a storage that reads them with little patience."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote import Storage

CONTENT = os.urandom(3_000_000)
OTHER = os.urandom(3_000_000)
HALF = 1_500_000
MB = 1_000_000


def make_storage(folder: Path, megabytes: float = 500, **network: Any) -> Storage:
    """Return a storage with its cache in ``folder/cache``, of so many megabytes."""
    settings = {"connect_timeout": 5.0, "read_timeout": 5.0, "max_tries": 3, "backoff": 0.01}
    return Storage(
        CacheConfig(dir=str(folder / "cache"), max_gib=megabytes * MB / 2**30),
        NetworkConfig(**(settings | {"max_backoff": 0.1} | network)),
    )


def content_of(storage: Storage, url: str, *, refetch: bool = False) -> bytes:
    """Return what a file opened by the storage holds."""
    with storage.open(url, refetch=refetch) as file:
        return os.pread(file.fileno(), 2**30, 0)


def cached_files(folder: Path) -> list[Path]:
    """Return the files of the cache in ``folder``, copies and half-written ones, without locks."""
    cache = folder / "cache"
    files = sorted(cache.iterdir()) if cache.exists() else []
    return [path for path in files if path.suffix != ".lock"]


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, up to 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)

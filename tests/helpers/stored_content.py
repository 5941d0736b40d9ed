"""What the servers of the tests hold, and a storage that fetches it with little patience."""

import os
import time
from pathlib import Path
from typing import Any

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.remote import Storage

CONTENT = os.urandom(3_000_000)
OTHER = os.urandom(3_000_000)
HALF = 1_500_000


def make_storage(folder: Path, **network: Any) -> Storage:
    settings = {"connect_timeout": 5.0, "read_timeout": 1.0, "max_tries": 3, "backoff": 0.01}
    return Storage(
        CacheConfig(dir=str(folder / "cache"), max_gib=0.5),
        NetworkConfig(**(settings | {"max_backoff": 0.1} | network)),
    )


def content_of(storage: Storage, url: str, *, again: bool = False) -> bytes:
    with storage.open(url, refetch=again) as file:
        return os.pread(file.fileno(), 2**30, 0)


def copies(folder: Path) -> list[str]:
    """Files in the cache, less the locks."""
    return sorted(p.name for p in (folder / "cache").iterdir() if not p.name.endswith(".lock"))


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)

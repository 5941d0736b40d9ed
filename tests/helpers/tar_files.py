"""Write tars member by member, for tests."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

SAMPLE = [("jpg", b"image"), ("json", b"{}"), ("txt", b"caption")]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **arguments: int) -> None:
    with tarfile.open(path, "w", **arguments) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for key in keys for extension, content in SAMPLE]

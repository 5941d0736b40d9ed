"""Damaged copies of the embedded shards."""

import json
from pathlib import Path

import webdataset

__all__ = ["write_dirty_shards"]


def write_dirty_shards(digits: Path, folder: Path) -> None:
    """A quarter of the captions is empty, and one shard is lost."""
    for shard in sorted((digits / "train").glob("*.tar")):
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        with webdataset.TarWriter(str(folder / shard.name)) as tar:
            for index, sample in enumerate(samples):
                caption = b"" if index % 4 == 0 else sample["txt"]
                tar.write({"__key__": sample["__key__"], "jpg": sample["jpg"], "txt": caption})
    (folder / "sizes.json").write_text(json.dumps({f"{n:05d}.tar": 179 for n in range(8)}))
    (folder / "00003.tar").write_bytes(b"garbage")

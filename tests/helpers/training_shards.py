"""A small set of training shards, and the batches that TrainData makes of it."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ds_linclip.config import (
    Config,
    DataConfig,
    ModelConfig,
    Source,
    TextTower,
    TrainConfig,
    VisionTower,
)
from ds_linclip.data import Batch, Storage, TrainData, find_shards

NUM_SAMPLES = 60
NUM_SHARDS = 4
BATCH = 12


def jpeg(number: int, mode: str = "RGB", file_format: str = "JPEG") -> bytes:
    """Return a different picture for every number."""
    pixels = np.random.default_rng(number).integers(256, size=(3, 3, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16)).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def sound_samples() -> dict[str, dict[str, bytes]]:
    return {
        f"{number:09d}": {"jpg": jpeg(number), "txt": f"picture {number}".encode()}
        for number in range(NUM_SAMPLES)
    }


def write_shards(folder: Path, samples: dict[str, dict[str, bytes]]) -> list[str]:
    """Distribute the samples over shards in blocks; the statistics count all of them."""
    folder.mkdir(exist_ok=True)
    size = NUM_SAMPLES // NUM_SHARDS
    items = list(samples.items())
    for number in range(NUM_SHARDS):
        block = items[number * size : (number + 1) * size]
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key, parts in block:
                for extension, content in parts.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": len(block)}))
    return [f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"]


def train_data(
    patterns: Sequence[str | Source],
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    global_batch_size: int = BATCH,
    lower_limits: Callable[[], None] | None = None,
    **data: Any,
) -> TrainData:
    sources = [Source(shards=p) if isinstance(p, str) else p for p in patterns]
    config = Config(
        data=DataConfig(
            train=sources, crop_scale=(0.5, 1.0), **{"shuffle_shards": 2, "num_workers": 0, **data}
        ),
        model=ModelConfig(
            vision=VisionTower(image_size=(8, 8), patch_size=4), text=TextTower(context_length=6)
        ),
        train=TrainConfig(global_batch_size=global_batch_size, seed=seed, steps=100),
    )
    groups = find_shards(sources, Storage(config.data.cache, config.data.network))
    if lower_limits is not None:
        lower_limits()
    return TrainData(config, groups, dp_rank=dp_rank, dp_size=dp_size)


def take(data: TrainData, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(data.batches(start), count))


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys == b.keys
        assert a.captions == b.captions
        assert a.skipped == b.skipped
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.texts, b.texts)

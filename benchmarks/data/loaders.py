"""One measurement of bench_data.py, in a process of its own: JSON in, JSON out.

``python benchmarks/data/loaders.py SETTINGS`` reads batches from one of two loaders and prints what
they cost. It imports no other module of the benchmarks, so that it runs from any folder.
"""

import importlib
import json
import logging
import multiprocessing
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

__all__ = ["Settings", "Throughput", "measure"]

#: proc(5) counts the time of a process in ticks of 10 ms on all common builds of Linux.
_TICKS_PER_SECOND = 100
_ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The loader, what it reads, and for how long.

    Attributes:
        loader: "ds_linclip" or "open_clip".
        shards: Paths of tars.
        num_samples: Samples in all shards, bad ones included.
        image_size: Side of the images in a batch, in pixels.
        batch_size, num_workers: Settings of the loader.
        warmup_batches: Number of batches read before the clocks start.
        batches: Number of batches read between the two readings of the clocks.
    """

    loader: str
    shards: list[str]
    num_samples: int
    image_size: int
    batch_size: int
    num_workers: int
    warmup_batches: int
    batches: int


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The cost of the batches after the warm-up.

    Attributes:
        samples: Number of samples in these batches.
        wall_seconds: Time from the last batch of the warm-up to the last batch.
        cpu_seconds: User and system time of the process and its workers in between.
        skipped: Bad samples of the first epoch by cause; open_clip's loader does not count them.
        webdataset: Version of the installed package.
    """

    samples: int
    wall_seconds: float
    cpu_seconds: float
    skipped: dict[str, int] = field(default_factory=dict)
    webdataset: str = ""


def measure(settings: Settings) -> Throughput:
    """Read batches in this process and its workers, and time those after the warm-up.

    Both loaders end with a float32 [B, 3, H, W] on the CPU, normalised, and token ids [B, L].
    """
    import webdataset

    torch.set_num_threads(1)
    batches = {"ds_linclip": _ds_linclip, "open_clip": _open_clip}[settings.loader](settings)
    skipped: Counter[str] = Counter()
    epoch = settings.num_samples // settings.batch_size
    samples, start = 0, (0.0, 0.0)
    for number in range(settings.warmup_batches + settings.batches):
        images, texts, bad = next(batches)
        assert images.dtype == torch.float32
        assert images.shape == (settings.batch_size, 3, settings.image_size, settings.image_size)
        assert texts.dtype == torch.int64
        assert texts.shape[0] == settings.batch_size
        if number < epoch:
            skipped += bad
        if number >= settings.warmup_batches:
            samples += len(images)
        if number == settings.warmup_batches - 1:
            start = time.perf_counter(), _cpu_seconds()
    end = time.perf_counter(), _cpu_seconds()
    return Throughput(
        samples=samples,
        wall_seconds=end[0] - start[0],
        cpu_seconds=end[1] - start[1],
        skipped=dict(skipped),
        webdataset=webdataset.__version__,
    )


_Batches = Iterator[tuple[torch.Tensor, torch.Tensor, Counter[str]]]


def _ds_linclip(settings: Settings) -> _Batches:
    from ds_linclip.config import Config, Source
    from ds_linclip.data import Storage, TrainData, find_shards

    config = Config()
    config.model.vision.image_size = settings.image_size, settings.image_size
    config.train.global_batch_size = settings.batch_size
    config.data.train = [Source(shards=shard) for shard in settings.shards]
    config.data.num_workers = settings.num_workers
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    data = TrainData(config, groups, dp_rank=0, dp_size=1)
    for batch in data.batches(0):
        yield batch.images, batch.texts, batch.skipped


def _open_clip(settings: Settings) -> _Batches:
    """Yield batches of the loader that open_clip_train.main builds.

    The arguments hold what its data module reads of them.
    """
    from open_clip import AugmentationCfg, get_tokenizer
    from open_clip.transform import image_transform

    get_wds_dataset = importlib.import_module("open_clip_train.data").get_wds_dataset

    logging.disable(logging.WARNING)  # one line for every bad sample
    arguments = Namespace(
        train_data="::".join(settings.shards),
        train_data_upsampling_factors=None,
        train_num_samples=_ENDLESS,  # or the workers would restart at the end of every epoch
        dataset_resampled=False,
        seed=0,
        batch_size=settings.batch_size,
        workers=settings.num_workers,
        world_size=1,
    )
    augmentation = AugmentationCfg(scale=(0.9, 1.0))
    transform = image_transform(settings.image_size, is_train=True, aug_cfg=augmentation)
    tokenizer = get_tokenizer("ViT-B-16")
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, texts in data.dataloader:
        yield images, texts, Counter()


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its living workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = fields[11:13]
        total += (int(user) + int(system)) / _TICKS_PER_SECOND
    return total


def main() -> int:
    settings = Settings(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(measure(settings))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

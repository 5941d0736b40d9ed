"""One measurement of bench_data.py, in a process of its own: JSON in, JSON out.

``python benchmarks/data/loaders.py ARGUMENTS`` calls :func:`measure` and prints what it returns. It
imports no other module of the benchmarks, so that it runs from any folder.
"""

import importlib
import json
import logging
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch

__all__ = ["measure"]

_ENDLESS = 10**9

#: Images, texts, and the number of bad samples that were replaced.
_Batches = Iterator[tuple[torch.Tensor, torch.Tensor, int]]


def measure(
    loader: str,
    shards: Sequence[str],
    *,
    num_samples: int,
    image_size: int,
    batch_size: int,
    num_workers: int,
    warmup_batches: int,
    batches: int,
) -> dict[str, Any]:
    """Read batches in this process and its workers, and time those after the warm-up.

    Both loaders end with a float32 [B, 3, H, W] on the CPU, normalised, and token ids [B, L].

    Args:
        loader: "ds_linclip" or "open_clip".
        shards: Paths of tars.
        num_samples: Samples in all shards, bad ones included.
        image_size: Side of the images in a batch, in pixels.
        batch_size, num_workers: Settings of the loader.
        warmup_batches: Number of batches read before the clocks start, at least one.
        batches: Number of batches read between the two readings of the clocks.

    Returns:
        "samples" in these batches; "wall_seconds" from the last batch of the warm-up to the last
        one; "cpu_seconds" of the process and its workers in between; "skipped" bad samples of the
        first epoch, which open_clip's loader does not count; the version of "webdataset"; rates.
    """
    import webdataset

    torch.set_num_threads(1)
    read = {"ds_linclip": _ds_linclip, "open_clip": _open_clip}[loader]
    source = read(shards, image_size, batch_size, num_workers)
    skipped, start = 0, (0.0, 0.0)
    for number in range(warmup_batches + batches):
        images, texts, bad = next(source)
        assert images.dtype == torch.float32
        assert images.shape == (batch_size, 3, image_size, image_size)
        assert texts.dtype == torch.int64
        assert texts.shape[0] == batch_size
        if number < num_samples // batch_size:
            skipped += bad
        if number == warmup_batches - 1:
            start = time.perf_counter(), _cpu_seconds()
    end = time.perf_counter(), _cpu_seconds()
    samples, wall, cpu = batches * batch_size, end[0] - start[0], end[1] - start[1]
    return {
        "samples": samples,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "skipped": skipped,
        "webdataset": webdataset.__version__,
        "samples_per_second": samples / wall,
        "samples_per_cpu_second": samples / cpu,
    }


def _ds_linclip(
    shards: Sequence[str], image_size: int, batch_size: int, num_workers: int
) -> _Batches:
    from ds_linclip.config import Config, Source
    from ds_linclip.data import Storage, TrainData, find_shards

    config = Config()
    config.model.vision.image_size = image_size, image_size
    config.train.global_batch_size = batch_size
    config.data.train = [Source(shards=shard) for shard in shards]
    config.data.num_workers = num_workers
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    data = TrainData(config, groups, dp_rank=0, dp_size=1)
    for batch in data.batches(0):
        yield batch.images, batch.texts, sum(batch.skipped.values())


def _open_clip(
    shards: Sequence[str], image_size: int, batch_size: int, num_workers: int
) -> _Batches:
    """Yield batches of the loader that open_clip_train.main builds.

    The arguments hold what its data module reads of them.
    """
    from open_clip import AugmentationCfg, get_tokenizer
    from open_clip.transform import image_transform

    get_wds_dataset = importlib.import_module("open_clip_train.data").get_wds_dataset

    logging.disable(logging.WARNING)  # one line for every bad sample
    arguments = Namespace(
        train_data="::".join(shards),
        train_data_upsampling_factors=None,
        train_num_samples=_ENDLESS,  # or the workers would restart at the end of every epoch
        dataset_resampled=False,
        seed=0,
        batch_size=batch_size,
        workers=num_workers,
        world_size=1,
    )
    augmentation = AugmentationCfg(scale=(0.9, 1.0))
    transform = image_transform(image_size, is_train=True, aug_cfg=augmentation)
    tokenizer = get_tokenizer("ViT-B-16")
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, texts in data.dataloader:
        yield images, texts, 0


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its living workers."""
    workers = (psutil.Process(worker.pid) for worker in multiprocessing.active_children())
    return time.process_time() + sum(sum(each.cpu_times()[:2]) for each in workers)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

"""Ranks that read training data as the trainer does and note which samples they saw.

Started by test_streaming.py through the deepspeed launcher: ``FOLDER PATTERN STEPS``. The state is
the number of steps in ``FOLDER/state``, replaced at every fifth step, as a checkpoint would be.
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from ds_linclip.config import Config, DataConfig, Source, TextTower, TrainConfig, VisionTower
from ds_linclip.config.schema import ModelConfig
from ds_linclip.data import Storage, TrainData, find_shards

GLOBAL_BATCH = 48


def main(folder: Path, pattern: str, steps: int) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = Config(
        model=ModelConfig(
            vision=VisionTower(image_size=(16, 16)), text=TextTower(context_length=8)
        ),
        data=DataConfig(
            train=[Source(shards=pattern)], num_lanes=8, shuffle_shards=3, num_workers=2
        ),
        train=TrainConfig(global_batch_size=GLOBAL_BATCH, seed=5),
    )
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    data = TrainData(config, groups, dp_rank=rank, dp_size=ranks)
    state = folder / "state"
    start = int(state.read_text()) if state.exists() else 0
    dist.barrier()
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    batches = data.batches(start)
    with (folder / f"from{start}_rank{rank}of{ranks}").open("w") as log:
        for step in range(start, steps):
            log.write(f"{step} {' '.join(next(batches).keys)}\n")
            log.flush()
            dist.barrier()
            if (step + 1) % 5 == 0 and rank == 0:
                (folder / "state.tmp").write_text(str(step + 1))
                os.replace(folder / "state.tmp", state)
    dist.barrier()


if __name__ == "__main__":
    # The launcher appends --local_rank=N.
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1], int(arguments[2]))

"""Batches for tensor-, context- and pipeline-parallel ranks: one reads, the others receive."""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ds_linclip.config import Config
from ds_linclip.data import Batch, TrainData
from ds_linclip.parallel.mesh import Mesh

__all__ = ["broadcast_batches"]


def broadcast_batches(
    data: TrainData, config: Config, mesh: Mesh, start_step: int, skipped_batches: int = 0
) -> Iterator[Batch]:
    """Yield this rank's batches from ``start_step`` on, without end.

    The first rank of every data-parallel group of peers reads the batches and broadcasts images and
    texts to its tensor- and context-parallel peers. Later pipeline stages get tensors of the right
    shapes without content, because their input comes from the stage before. Keys, captions and
    counts of bad samples stay on the reading rank.

    Where reading fails, the batch is one of NaN that holds the failure: the other ranks need this
    one for the step, and a gradient that is not finite changes nothing on any of them.

    Args:
        data, config, mesh: The run's data, configuration and ranks.
        start_step: Number of finished optimizer steps.
        skipped_batches: Number of batches that the run has left out, after loss spikes.
    """
    size, nothing = config.train.global_batch_size // mesh.dp.size, torch.zeros(())
    own = data.batches(start_step, mesh.device, skipped_batches)
    for step in itertools.count(start_step):
        images = (size, 3, *config.image_size_at(step))
        texts = (size, config.model.text.context_length)
        if mesh.pp.rank > 0:  # shapes that take no memory
            yield Batch(images=nothing.expand(images), texts=nothing.long().expand(texts))
            continue
        if mesh.is_first_of_its_data:
            try:
                batch = next(own)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait
                batch = Batch(
                    images=torch.full(images, torch.nan, device=mesh.device),
                    texts=torch.zeros(texts, dtype=torch.int64, device=mesh.device),
                    failure=error,
                )
        else:
            batch = Batch(
                images=torch.empty(images, device=mesh.device),
                texts=torch.empty(texts, dtype=torch.int64, device=mesh.device),
            )
        _broadcast(batch, mesh)
        yield batch


def _broadcast(batch: Batch, mesh: Mesh) -> None:
    """Send images and texts from the first of this rank's peers to the others, in place."""
    if mesh.peers.size > 1:
        for tensor in (batch.images, batch.texts):
            dist.broadcast(tensor, group=mesh.peers.group, group_src=0)

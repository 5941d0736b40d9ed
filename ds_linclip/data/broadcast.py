"""Batches for ranks that share their samples: one of them reads and decodes."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ds_linclip.config import Config
from ds_linclip.data import Batch, TrainData
from ds_linclip.parallel.mesh import Mesh

__all__ = ["feed"]


def feed(
    data: TrainData, config: Config, mesh: Mesh, start_step: int, skipped_batches: int = 0
) -> Iterator[Batch]:
    """This rank's batches from ``start_step`` on, without end.

    Args:
        data, config, mesh: of the run.
        start_step: optimizer steps done.
        skipped_batches: batches of the data order that the run has left out.

    The first rank of a data-parallel place reads them, and hands images and texts to its tensor-
    and context-parallel peers. Later pipeline stages get shapes alone: what they work on comes from
    the stage before. Keys, captions and counts of bad samples are with the reader.

    Raises:
        DataError: on the reader, as :meth:`~ds_linclip.data.TrainData.batches`.
    """
    if mesh.is_first_of_its_data:
        for batch in data.batches(start_step, mesh.device, skipped_batches):
            if mesh.peers.size > 1:
                for tensor in (batch.images, batch.texts):
                    dist.broadcast(tensor, group=mesh.peers.group, group_src=0)
            yield batch
    size = config.train.global_batch_size // mesh.dp.size
    step = start_step
    while True:
        images = (size, 3, *config.image_size_at(step))
        texts = (size, config.model.text.context_length)
        yield _received(images, texts, mesh) if mesh.pp.rank == 0 else _shapes(images, texts)
        step += 1


def _received(images: tuple[int, ...], texts: tuple[int, ...], mesh: Mesh) -> Batch:
    batch = Batch(
        images=torch.empty(images, device=mesh.device),
        texts=torch.empty(texts, dtype=torch.int64, device=mesh.device),
        keys=[],
        captions=[],
    )
    for tensor in (batch.images, batch.texts):
        dist.broadcast(tensor, group=mesh.peers.group, group_src=0)
    return batch


def _shapes(images: tuple[int, ...], texts: tuple[int, ...]) -> Batch:
    """Of the right shapes, without memory."""
    nothing = torch.zeros(())
    return Batch(
        images=nothing.expand(images), texts=nothing.long().expand(texts), keys=[], captions=[]
    )

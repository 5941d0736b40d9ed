"""The images that evaluators take, in batches, and how ranks divide such work among themselves.

``ds_linclip.data.LabelledData`` is an :class:`ImageSet`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from ds_linclip.process.consensus import agree, gather

__all__ = ["ImageBatch", "ImageSet", "map_over_ranks", "show_progress"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageBatch(Protocol):
    """B decoded images and U images that could not be decoded, with their classes."""

    @property
    def images(self) -> Tensor: ...  # [B, 3, H, W], normalised
    @property
    def labels(self) -> Tensor: ...  # [B], int64
    @property
    def keys(self) -> Sequence[str]: ...  # B names
    @property
    def captions(self) -> Sequence[str]: ...  # B texts, one caption per line
    @property
    def unreadable_labels(self) -> Tensor: ...  # [U], int64
    @property
    def unreadable(self) -> Sequence[tuple[str, str]]: ...  # U pairs: key, reason


class ImageSet(Protocol):
    """Images in numbered batches; a batch holds the same images whichever rank reads it."""

    @property
    def num_batches(self) -> int: ...
    def batches(self, numbers: Sequence[int]) -> Iterable[ImageBatch]: ...


def map_over_ranks(
    work: Callable[[Sequence[Item]], Iterable[Result]],
    items: Sequence[Item],
    group: ProcessGroup | None,
) -> list[Result]:
    """Divide items among the ranks of a group and return the results of all items on every rank.

    Args:
        work: Returns one result, which can be pickled, for each of the items it is given. It must
            not communicate over ``group``.
        items: The same on every rank; item i goes to rank i modulo the number of ranks.
        group: The ranks that call this function together; None: this process alone.

    Returns:
        The results, in the order of the items.

    Raises:
        AgreedError: on every rank, when ``work`` raised ValueError or OSError on one of them.
    """
    rank, world_size = _rank(group), 1 if group is None else dist.get_world_size(group)
    share = agree(lambda: list(work(items[rank::world_size])), group, (ValueError, OSError))
    shares = gather(share, group)
    return [shares[i % world_size][i // world_size] for i in range(len(items))]


def show_progress(
    items: Iterable[Item], total: int, *, title: str, unit: str, group: ProcessGroup | None
) -> Iterable[Item]:
    """Return ``items`` behind a progress bar, which the first rank shows after five seconds."""
    hidden = _rank(group) > 0
    bar: Iterable[Item] = tqdm(items, title, total, unit=unit, delay=5, leave=False, disable=hidden)
    return bar


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)

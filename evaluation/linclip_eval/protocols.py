"""The images that evaluators take; ``ds_linclip.data.LabelledData`` is an :class:`ImageSet`."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["ImageBatch", "ImageSet"]


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

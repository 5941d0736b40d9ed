"""Images as evaluators take them: ``ds_linclip.data.LabelledData`` is such a set."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["ImageBatch", "ImageSet"]


class ImageBatch(Protocol):
    """B images, and U that could not be decoded, with their classes."""

    @property
    def images(self) -> Tensor: ...  # [B, 3, H, W], normalised
    @property
    def labels(self) -> Tensor: ...  # [B], int64
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...  # of an image, one per line
    @property
    def unreadable_labels(self) -> Tensor: ...  # [U], int64, of images that are not in ``images``
    @property
    def unreadable(self) -> Sequence[tuple[str, str]]: ...  # their keys, and why


class ImageSet(Protocol):
    """Images in batches that do not depend on who reads them."""

    @property
    def num_batches(self) -> int: ...
    def batches(self, numbers: Sequence[int]) -> Iterable[ImageBatch]: ...

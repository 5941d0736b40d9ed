"""What evaluators take of a model and of its data, and the check of what a model returns.

``ds_linclip.data.LabelledData`` is an :class:`ImageSet`.

Where an evaluator takes a ``group``, it is the process group whose ranks call together and divide
the work among themselves; None: this process alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor

from ds_linclip.data import UnreadableImage

__all__ = ["Better", "Encoder", "Encoders", "ImageBatch", "ImageSet", "Tokenizer", "unit_features"]

#: Whether a score is better the larger or the smaller it is.
Better = Literal["max", "min"]
#: Maps images [B, 3, H, W], or token ids [B, L], to features [B, E], normalised or not. It must not
#: communicate between ranks.
Encoder = Callable[[Tensor], Tensor]
#: Maps texts to token ids [B, L].
Tokenizer = Callable[[list[str]], Tensor]


class Encoders(Protocol):
    """A model in eval mode; each method is an :data:`Encoder`."""

    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, texts: Tensor) -> Tensor: ...


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
    def unreadable(self) -> Sequence[UnreadableImage]: ...  # U images


class ImageSet(Protocol):
    """Images in numbered batches; a batch holds the same images whichever rank reads it."""

    @property
    def num_batches(self) -> int: ...
    def batches(self, numbers: Sequence[int]) -> Iterable[ImageBatch]: ...


def unit_features(features: Tensor, names: Sequence[str]) -> Tensor:
    """Return features [B, E] in float32, with rows of length 1.

    Raises:
        ValueError: naming the first of the B images or texts whose features are NaN or infinite.
    """
    features = features.float()
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the features of {names[bad[0]]!r} must be finite; those of {len(bad)} of "
            f"{len(names)} are NaN or infinite: check the model's weights, or take a higher "
            "precision"
        )
    return F.normalize(features, dim=-1)

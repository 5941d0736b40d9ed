"""Features of a whole data set, the cosines between them, and ranks by cosine.

A batch holds the same samples on any number of ranks, and it does not matter which rank embeds it:
features, and every score computed from them, are bit-identical on any number of ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_linclip.data import UnreadableImage, clean_text
from ds_linclip.process.consensus import map_over_ranks
from ds_linclip.process.text_files import split_lines
from linclip_eval.protocols import Encoder, ImageBatch, ImageSet, unit_features

__all__ = ["Features", "best_ranks", "extract_features", "similarities"]

_TEXTS_PER_FORWARD = 512
#: Features are rounded to multiples of this. A sum of products of two of them, at most 1 in
#: magnitude, is a multiple of its square and fits into the 53 bits of float64.
_GRID = 2.0**-24
_SIMILARITIES_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Features:
    """Image and caption features of a data set, in the order of the data.

    Attributes:
        images: [N, E] float32, rows of length 1.
        labels: [N] int64 class numbers.
        keys: The keys of the N images.
        texts: [T, E] float32, likewise; the captions of an image follow each other.
        captions: The T captions behind ``texts``.
        owners: [T] int64, the index of the image that each caption belongs to.
        unreadable: The U images that could not be read. Their captions are unknown.
        unreadable_labels: [U] int64, the class numbers of these images.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]
    texts: NDArray[np.float32]
    captions: tuple[str, ...]
    owners: NDArray[np.int64]
    unreadable: tuple[UnreadableImage, ...]
    unreadable_labels: NDArray[np.int64]

    @property
    def uncaptioned(self) -> tuple[str, ...]:
        """The keys of the images that have no caption."""
        captioned = set(self.owners.tolist())
        return tuple(key for image, key in enumerate(self.keys) if image not in captioned)


def extract_features(
    encode_image: Encoder,
    data: ImageSet,
    *,
    device: torch.device | str,
    embed_texts: Callable[[list[str]], Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Features:
    """Embed every image of a data set once, and its captions; every rank returns the same features.

    Args:
        data: The images, the same on every rank.
        device: The device that images are copied to.
        embed_texts: Maps captions to features [B, E]; None: captions are left out.

    Raises:
        ValueError: on all ranks, for data without a readable image, for features that are not
            finite, or when reading them raised ValueError or OSError on one rank.
    """

    def embed_batches(numbers: Sequence[int]) -> Iterator[Features]:
        for batch in data.batches(numbers):
            yield _embed(batch, encode_image, embed_texts, device)

    parts = map_over_ranks(embed_batches, range(data.num_batches), group, title="batches of images")
    if not any(len(part.images) for part in parts):
        raise ValueError("data (0 readable images) must hold at least one image that can be read")
    return _join(parts)


def similarities(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    *,
    device: torch.device | str,
    at_once: int = _SIMILARITIES_AT_ONCE,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the cosines between queries and candidates, a block of queries at a time.

    Features are first rounded to 24 binary digits, about the precision that they have; their dot
    products in float64 are then exact. Neither the block size nor the device changes a bit, and
    equal features have equal cosines, so ties are exact.

    Args:
        queries, candidates: [Q, E] and [M, E], rows of length 1.
        device: The device that computes.
        at_once: The approximate number of cosines in a block.

    Yields:
        A slice of the queries and their cosines [B, M], float64 on ``device``.
    """
    columns = _on_grid(candidates, device).T  # [E, M]
    step = max(1, at_once // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, _on_grid(queries[rows], device) @ columns


def best_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the rank of every query's best relevant candidate, sorted by descending score.

    Of equal scores the candidate with the lower index comes first.

    Args:
        scores: [B, M], higher is better; -inf marks candidates that are never retrieved.
        relevant: [B, M] bool, any number of candidates per query.

    Returns:
        [B] int64 ranks from 1; M + 1 where no relevant candidate is retrieved.
    """
    num_candidates = scores.shape[1]
    relevant_scores = scores.masked_fill(~relevant, -math.inf)
    index = relevant_scores.argmax(dim=1, keepdim=True)  # the first of equal scores
    best = relevant_scores.gather(1, index)
    indices = torch.arange(num_candidates, device=scores.device)
    ahead = (scores > best) | ((scores == best) & (indices < index))
    ranks = 1 + ahead.sum(dim=1)
    return ranks.masked_fill(best[:, 0] == -math.inf, num_candidates + 1)


@torch.no_grad()
def _embed(
    batch: ImageBatch,
    encode_image: Encoder,
    embed_texts: Callable[[list[str]], Tensor] | None,
    device: torch.device | str,
) -> Features:
    owners, captions = [], []
    if embed_texts is not None:
        for image, lines in enumerate(batch.captions):
            of_image = [line for line in split_lines(lines) if clean_text(line)]
            captions += of_image
            owners += [image] * len(of_image)
    chunks = [
        captions[i : i + _TEXTS_PER_FORWARD] for i in range(0, len(captions), _TEXTS_PER_FORWARD)
    ]
    images = batch.images.to(device, non_blocking=True)
    texts = [unit_features(embed_texts(c), c) for c in chunks] if embed_texts else []
    return Features(
        images=_rows([unit_features(encode_image(images), batch.keys)] if len(images) else []),
        labels=batch.labels.numpy(),
        keys=tuple(batch.keys),
        texts=_rows(texts),
        captions=tuple(captions),
        owners=np.array(owners, np.int64),
        unreadable=tuple(batch.unreadable),
        unreadable_labels=batch.unreadable_labels.numpy(),
    )


def _rows(features: Sequence[Tensor]) -> NDArray[np.float32]:
    return torch.cat(list(features)).cpu().numpy() if features else np.empty((0, 0), np.float32)


def _join(parts: Sequence[Features]) -> Features:
    starts = accumulate((len(part.images) for part in parts), initial=0)
    owners = [part.owners + start for part, start in zip(parts, starts, strict=False)]
    return Features(
        images=_stack([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(chain(*(part.keys for part in parts))),
        texts=_stack([part.texts for part in parts]),
        captions=tuple(chain(*(part.captions for part in parts))),
        owners=np.concatenate(owners),
        unreadable=tuple(chain(*(part.unreadable for part in parts))),
        unreadable_labels=np.concatenate([part.unreadable_labels for part in parts]),
    )


def _stack(blocks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    filled = [block for block in blocks if len(block)]  # an empty block has no width
    return np.concatenate(filled) if filled else np.empty((0, 0), np.float32)


def _on_grid(features: NDArray[np.float32], device: torch.device | str) -> Tensor:
    wide = torch.from_numpy(features).to(device, torch.float64)
    return wide.div_(_GRID).round_().mul_(_GRID)

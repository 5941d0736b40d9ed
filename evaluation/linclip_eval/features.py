"""A data set as a model sees it, and how near its images and captions are to each other.

A batch holds the same samples however many ranks there are, and which rank embeds it changes
nothing: features, and every score made of them, are the same on any number of ranks, to the last
bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import itemgetter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from ds_linclip.process.consensus import agree
from linclip_eval.protocols import ImageBatch, ImageSet

__all__ = ["Features", "best_ranks", "extract_features", "similarities"]

_TEXTS_PER_FORWARD = 512
#: Features are rounded to multiples of this. A sum of products of two of them, at most 1 in
#: magnitude, is a multiple of its square and fits into the 53 bits of float64.
_GRID = 2.0**-24
_SIMILARITIES_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the encoders make of a data set, in the order of the data.

    Attributes:
        images: [N, E] float32, of length 1; NaN where the model gave no finite numbers.
        labels: [N] int64 class numbers.
        keys: Of the N images.
        texts: [T, E] float32, likewise; those of an image come one after the other.
        captions: What they are features of.
        owners: [T] int64: the image that each belongs to.
        unreadable: Key and reason of every image that could not be decoded. Its captions are
            unknown.
        unreadable_labels: [U] int64, of those.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]
    texts: NDArray[np.float32]
    captions: tuple[str, ...]
    owners: NDArray[np.int64]
    unreadable: tuple[tuple[str, str], ...]
    unreadable_labels: NDArray[np.int64]

    @property
    def uncaptioned(self) -> tuple[str, ...]:
        """Keys of the images that none of the captions belongs to."""
        captioned = set(self.owners.tolist())
        return tuple(key for image, key in enumerate(self.keys) if image not in captioned)

    @property
    def num_nonfinite(self) -> int:
        """Images and captions whose features are NaN."""
        rows = (self.images, self.texts)
        return sum(int((~np.isfinite(of).all(axis=1)).sum()) for of in rows)


def extract_features(
    encode_image: Callable[[Tensor], Tensor],
    data: ImageSet,
    *,
    device: torch.device | str,
    embed_texts: Callable[[list[str]], Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Features:
    """Embed every image of a data set once, and its captions.

    Args:
        encode_image: images [B, 3, H, W] to image features [B, E], normalised or not. With
            ``group`` it must not itself communicate over that group.
        data: the same on every rank.
        device: where images go.
        embed_texts: captions to text features [B, E], likewise; None: captions are left out.
        group: the ranks that share out the batches, each batch to one of them.

    Returns:
        The same on all ranks.

    Raises:
        ValueError: for data without a single image that can be read, or that refuse one; with
            ``group``, on all of its ranks if on one.
        OSError: from ``data``, likewise.
    """
    rank, world_size = (
        (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    )

    def rank_share() -> list[tuple[int, Features]]:
        numbers = range(rank, data.num_batches, world_size)
        progress = tqdm(
            data.batches(numbers),
            "images",
            len(numbers),
            unit="batch",
            delay=5,
            leave=False,
            disable=rank > 0,
        )
        return [
            (batch.number, _embed(batch, encode_image, embed_texts, device)) for batch in progress
        ]

    share = agree(rank_share, group, errors=(ValueError, OSError))
    shares = [share]
    if group is not None:
        shares *= world_size
        dist.all_gather_object(shares, share, group=group)
    parts = [part for _, part in sorted(chain(*shares), key=itemgetter(0))]
    if not any(len(part.images) for part in parts):
        raise ValueError("data (0 readable images) must hold at least one image that can be read")
    return _joined(parts)


def similarities(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    *,
    device: torch.device | str,
    at_once: int = _SIMILARITIES_AT_ONCE,
) -> Iterator[tuple[slice, Tensor]]:
    """Cosines between features, for some of the queries at a time.

    Features are rounded to 24 binary digits behind the point, about their own precision; their
    products in float64 have no error at all. So neither the size of the pieces nor the device
    changes a bit, and equal features have equal cosines: ties are where they should be.

    Args:
        queries: [Q, E], of length 1.
        candidates: [M, E], of length 1.
        device: where to compute.
        at_once: about as many cosines are held.

    Yields:
        A slice of the queries, and their cosines [B, M] float64 on ``device``; -inf where one of
        the two features is NaN.
    """
    columns = _on_grid(candidates, device).T  # [E, M]
    step = max(1, at_once // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, (_on_grid(queries[rows], device) @ columns).nan_to_num_(nan=-math.inf)


def best_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Place of the best right candidate of every query, when candidates are sorted by score.

    Of equal scores the candidate with the lower number goes first.

    Args:
        scores: [B, M], higher is better; -inf: never found.
        right: [B, M] bool: the candidates that are right, any number of them.

    Returns:
        [B] int64, from 1; M + 1 where no right candidate can be found.
    """
    num_candidates = scores.shape[1]
    of_right = scores.masked_fill(~right, -math.inf)
    place = of_right.argmax(dim=1, keepdim=True)  # the first of equals
    best = of_right.gather(1, place)
    numbers = torch.arange(num_candidates, device=scores.device)
    ahead = (scores > best) | ((scores == best) & (numbers < place))
    ranks = 1 + ahead.sum(dim=1)
    return ranks.masked_fill(best[:, 0] == -math.inf, num_candidates + 1)


@torch.no_grad()
def _embed(
    batch: ImageBatch,
    encode_image: Callable[[Tensor], Tensor],
    embed_texts: Callable[[list[str]], Tensor] | None,
    device: torch.device | str,
) -> Features:
    owners, captions = [], []
    if embed_texts is not None:
        for image, lines in enumerate(batch.captions):
            texts = [line.strip() for line in lines.splitlines() if line.strip()]
            captions += texts
            owners += [image] * len(texts)
    pieces = [
        captions[i : i + _TEXTS_PER_FORWARD] for i in range(0, len(captions), _TEXTS_PER_FORWARD)
    ]
    images = batch.images.to(device, non_blocking=True)
    return Features(
        images=_normalised([encode_image(images)] if len(images) else []),
        labels=batch.labels.numpy(),
        keys=tuple(batch.keys),
        texts=_normalised([embed_texts(piece) for piece in pieces] if embed_texts else []),
        captions=tuple(captions),
        owners=np.array(owners, np.int64),
        unreadable=tuple(batch.unreadable),
        unreadable_labels=batch.unreadable_labels.numpy(),
    )


def _normalised(features: Sequence[Tensor]) -> NDArray[np.float32]:
    if not features:
        return np.empty((0, 0), np.float32)
    rows: NDArray[np.float32] = F.normalize(torch.cat(list(features)).float(), dim=-1).cpu().numpy()
    rows[~np.isfinite(rows).all(axis=1)] = np.nan
    return rows


def _joined(parts: Sequence[Features]) -> Features:
    starts = accumulate((len(part.images) for part in parts), initial=0)
    return Features(
        images=_stacked([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(chain(*(part.keys for part in parts))),
        texts=_stacked([part.texts for part in parts]),
        captions=tuple(chain(*(part.captions for part in parts))),
        owners=np.concatenate(
            [part.owners + start for part, start in zip(parts, starts, strict=False)]
        ),
        unreadable=tuple(chain(*(part.unreadable for part in parts))),
        unreadable_labels=np.concatenate([part.unreadable_labels for part in parts]),
    )


def _stacked(blocks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Without those that have no rows, and so no width."""
    filled = [block for block in blocks if len(block)]
    return np.concatenate(filled) if filled else np.empty((0, 0), np.float32)


def _on_grid(features: NDArray[np.float32], device: torch.device | str) -> Tensor:
    wide = torch.from_numpy(features).to(device, torch.float64)
    return wide.div_(_GRID).round_().mul_(_GRID)

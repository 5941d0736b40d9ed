"""Image-text retrieval: rank all captions for every image, and all images for every caption.

An image may have several captions, as in COCO and Flickr30k; its rank is that of its best caption
(CLIP_benchmark's recall). With one caption per image all metrics equal those of
``open_clip_train``, under its names. Of equal similarities the earlier candidate in the data comes
first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_linclip.process.consensus import map_over_ranks
from linclip_eval.features import Features, best_ranks, extract_features, similarities
from linclip_eval.protocols import Encoder, ImageSet, Tokenizer

__all__ = ["DIRECTIONS", "RECALLS", "RetrievalResult", "rank_captions", "retrieval"]

#: The values of k of the reported recalls.
RECALLS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """The rank, from 1, of the right answer to every query.

    Attributes:
        features: The features that were ranked: N images, T captions, and U unreadable images.
        image_to_text: [N + U] for every image, unreadable ones last: the rank of its best caption
            among all T, or T + 1 when it has none with finite features.
        text_to_image: [T] for every caption: the rank of its image among all N, or N + 1 when that
            has no finite features.
    """

    features: Features
    image_to_text: NDArray[np.int64]
    text_to_image: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        """The number of images, unreadable ones included."""
        return len(self.image_to_text)

    @property
    def num_captions(self) -> int:
        """The number of captions of readable images."""
        return len(self.text_to_image)

    def recall(self, direction: str, k: int) -> float:
        """Return the share of queries, of one of :data:`DIRECTIONS`, with a right answer among
        their first k candidates."""
        return float((getattr(self, direction) <= k).mean())

    def metrics(self) -> dict[str, float]:
        """Return recalls in [0, 1] and ranks from 1, under open_clip's names.

        The median of an even number of ranks is rounded down, as in open_clip.
        """
        metrics: dict[str, float] = {}
        for direction in DIRECTIONS:
            ranks = getattr(self, direction)
            metrics[f"{direction}_mean_rank"] = float(ranks.mean())
            metrics[f"{direction}_median_rank"] = float(math.floor(np.median(ranks)))
            for k in RECALLS:
                metrics[f"{direction}_R@{k}"] = self.recall(direction, k)
        return metrics


def retrieval(
    encode_image: Encoder,
    encode_text: Encoder,
    data: ImageSet,
    *,
    tokenizer: Tokenizer,
    device: torch.device | str,
    group: ProcessGroup | None = None,
    strict: bool = True,
) -> RetrievalResult:
    """Rank all captions for every image, and all images for every caption, the same on all ranks.

    Args:
        data: The images; every line of an image's text is a caption.
        device: The device of the model, which also computes similarities.
        strict: Whether an image without a caption is an error. Otherwise it counts as not found.

    Raises:
        ValueError: on all ranks, for data without a readable image or a caption, with ``strict``
            for an image without a caption, or when reading the data failed on one rank.
    """
    features = extract_features(
        encode_image,
        data,
        device=device,
        embed_texts=lambda captions: encode_text(tokenizer(captions).to(device)),
        group=group,
    )
    if strict and (missing := features.uncaptioned):
        raise ValueError(
            f"image {missing[0]} must have a caption; {len(missing)} of {len(features.keys)} "
            "have none"
        )
    return rank_captions(features, device=device, group=group)


def rank_captions(
    features: Features, *, device: torch.device | str, group: ProcessGroup | None = None
) -> RetrievalResult:
    """Rank captions and images by features that have already been extracted, the same on all ranks.

    Raises:
        ValueError: when there is no caption.
    """
    if not features.captions:
        raise ValueError("captions ([]) must hold at least one caption")
    owners = torch.from_numpy(features.owners).to(device)
    images = torch.arange(len(features.images), device=device)
    image_to_text = np.full(
        len(features.images) + len(features.unreadable), len(features.captions) + 1
    )
    ranks = partial(_ranks, device=device, group=group)
    image_to_text[: len(images)] = ranks(
        features.images, features.texts, lambda rows: images[rows, None] == owners
    )
    text_to_image = ranks(
        features.texts, features.images, lambda rows: owners[rows, None] == images
    )
    return RetrievalResult(
        features=features, image_to_text=image_to_text, text_to_image=text_to_image
    )


def _ranks(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    relevant: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str,
    group: ProcessGroup | None,
) -> NDArray[np.int64]:
    """Return the rank of every query's best relevant candidate, [Q]; the ranks of ``group`` divide
    the queries. ``relevant`` maps numbers of queries [B] to [B, M] bool."""
    parts = 1 if group is None else group.size()

    def of_parts(numbers: Sequence[int]) -> Iterator[NDArray[np.int64]]:
        for number in numbers:
            own = torch.arange(number, len(queries), parts, device=device)
            found = np.empty(len(own), np.int64)
            for rows, scores in similarities(queries[number::parts], candidates, device=device):
                found[rows] = best_ranks(scores, relevant(own[rows])).cpu().numpy()
            yield found

    ranks = np.empty(len(queries), np.int64)
    for number, found in enumerate(map_over_ranks(of_parts, range(parts), group)):
        ranks[number::parts] = found
    return ranks

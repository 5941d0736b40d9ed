"""Retrieval: finding the captions of an image, and the image of a caption.

An image may have several captions, as in COCO and Flickr30k: it is found where one of them is, its
rank is that of the best of them (CLIP_benchmark's recall). With one caption per image all figures
are those of ``open_clip_train``, under its names. Of equal similarities the lower number, in the
order of the data, goes first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from linclip_eval.features import Features, best_ranks, extract_features, similarities
from linclip_eval.protocols import ImageSet

__all__ = ["DIRECTIONS", "RECALLS", "RetrievalResult", "rank_captions", "retrieval"]

#: The k of the recalls.
RECALLS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Ranks of what was looked for, from 1.

    Attributes:
        features: What was ranked: N images, T captions, and U images that cannot be read.
        image_to_text: [N + U] for every image, the unreadable ones last, rank of its best caption
            among all T; T + 1 where it has none that could be found.
        text_to_image: [T] for every caption, rank of its image among all N; N + 1 where it could
            not be found.
    """

    features: Features
    image_to_text: NDArray[np.int64]
    text_to_image: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        """Images that were looked up, whether they can be read and found or not."""
        return len(self.image_to_text)

    @property
    def num_captions(self) -> int:
        return len(self.text_to_image)

    def recall(self, direction: str, k: int) -> float:
        """Share of the queries for which something right is among the k first.

        Args:
            direction: ``image_to_text`` or ``text_to_image``.
            k: from 1.
        """
        return float((self._ranks(direction) <= k).mean())

    def metrics(self) -> dict[str, float]:
        """Recalls in [0, 1] and ranks from 1, under open_clip's names.

        The median of an even number of ranks is rounded down, as open_clip does.
        """
        metrics: dict[str, float] = {}
        for direction in DIRECTIONS:
            ranks = self._ranks(direction)
            metrics[f"{direction}_mean_rank"] = float(ranks.mean())
            metrics[f"{direction}_median_rank"] = float(math.floor(np.median(ranks)))
            for k in RECALLS:
                metrics[f"{direction}_R@{k}"] = self.recall(direction, k)
        return metrics

    def _ranks(self, direction: str) -> NDArray[np.int64]:
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}[direction]


def retrieval(
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    data: ImageSet,
    *,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    group: ProcessGroup | None = None,
    strict: bool = True,
) -> RetrievalResult:
    """Rank all captions for every image, and all images for every caption.

    Args:
        encode_image: images [B, 3, H, W] to image features [B, E], normalised or not. With
            ``group`` it must not itself communicate over that group.
        encode_text: token ids [B, L] to text features [B, E], likewise.
        data: images, each with the captions that are the lines of its text.
        tokenizer: captions to token ids [B, L].
        device: where images and token ids go, and similarities are computed.
        group: the ranks that share out the images.
        strict: whether an image without a caption is an error; otherwise it counts as not found.

    Returns:
        The same on all ranks.

    Raises:
        ValueError: for data without an image or a caption, an image without one if ``strict``, or
            one that the data refuse; on all ranks if on one.
        OSError: from the data, likewise.
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
    return rank_captions(features, device=device)


def rank_captions(features: Features, *, device: torch.device | str) -> RetrievalResult:
    """What :func:`retrieval` does, with features that are already there.

    Args:
        features: with those of captions.
        device: where similarities are computed.

    Raises:
        ValueError: for no caption at all.
    """
    if not features.captions:
        raise ValueError("captions ([]) must hold at least one caption")
    owners = torch.from_numpy(features.owners).to(device)
    images = torch.arange(len(features.images), device=device)
    image_to_text = np.full(
        len(features.images) + len(features.unreadable), len(features.captions) + 1
    )
    text_to_image = np.empty(len(features.captions), np.int64)
    for rows, scores in similarities(features.images, features.texts, device=device):
        right = images[rows, None] == owners  # [B, T]
        image_to_text[rows] = best_ranks(scores, right).cpu().numpy()
    for rows, scores in similarities(features.texts, features.images, device=device):
        right = owners[rows, None] == images  # [B, N]
        text_to_image[rows] = best_ranks(scores, right).cpu().numpy()
    return RetrievalResult(
        features=features, image_to_text=image_to_text, text_to_image=text_to_image
    )

"""A data set without files, for tests: random images with labels and captions, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor

from ds_linclip.data import UnreadableImage

WORDS = (
    *("red", "green", "blue", "small", "large", "circle", "square", "star", "dog", "cat", "house"),
    *("tree", "river", "seven", "photo", "left", "right", "above", "below", "two", "three"),
)


@dataclass(kw_only=True)
class StandInBatch:
    number: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]
    unreadable_labels: Tensor
    unreadable: list[UnreadableImage]


class StandInData:
    """A set of given samples, in batches.

    Args:
        images: [N, 3, H, W].
        labels: The class numbers of the N images.
        captions: The texts of the N images, one caption per line.
        unreadable: The indices of images that cannot be read.
        refused: The index of an image that raises an error; None: no image does.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int],
        captions: Sequence[str],
        *,
        batch_size: int = 4,
        unreadable: Sequence[int] = (),
        refused: int | None = None,
    ) -> None:
        self._images, self._labels, self._captions = images, torch.tensor(labels), captions
        self._batch_size, self._unreadable, self._refused = batch_size, unreadable, refused
        self.num_batches = -(-len(images) // batch_size)
        self.num_read = 0

    def batches(self, numbers: Sequence[int]) -> Iterator[StandInBatch]:
        for number in numbers:
            start = number * self._batch_size
            samples = range(start, min(start + self._batch_size, len(self._images)))
            if self._refused in samples:
                raise ValueError(f"sample s{self._refused} must be readable")
            self.num_read += len(samples)
            rows = [i for i in samples if i not in self._unreadable]
            lost = [i for i in samples if i in self._unreadable]
            yield StandInBatch(
                number=number,
                images=self._images[rows],
                labels=self._labels[rows],
                keys=[f"s{i}" for i in rows],
                captions=[self._captions[i] for i in rows],
                unreadable_labels=self._labels[lost],
                unreadable=[
                    UnreadableImage(f"s{i}", "image_undecodable", f"sample s{i}") for i in lost
                ],
            )


def random_data(num_images: int, num_captions: Sequence[int], **options: Any) -> StandInData:
    """Return random images of five classes; image i has ``num_captions[i % len]`` captions."""
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.randn(num_images, 3, 8, 8, generator=generator)
    captions = []
    for i in range(num_images):
        picks = torch.randint(
            len(WORDS), (num_captions[i % len(num_captions)], 5), generator=generator
        )
        captions.append("\n".join(" ".join(WORDS[word] for word in line) for line in picks))
    labels = torch.randint(5, (num_images,), generator=generator).tolist()
    return StandInData(images, labels, captions, **options)


def tiny_clip() -> open_clip.CLIP:
    """Return a model with random weights, spread out so that features differ clearly."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=16)

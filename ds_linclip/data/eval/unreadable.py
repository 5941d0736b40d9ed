"""Held-out images that cannot be read: what they are, and how many there are of each cause."""

from collections.abc import Iterable
from typing import NamedTuple

from ds_linclip.data.tally import Tally

__all__ = ["UnreadableImage", "describe_unreadable"]


class UnreadableImage(NamedTuple):
    """An image that counts as wrong because it cannot be read.

    Attributes:
        key: Its name in its tar, or its path in the folder.
        cause: A short name for the counts, such as ``image_undecodable``.
        where: Its description for messages, with the path of its file.
    """

    key: str
    cause: str
    where: str


def describe_unreadable(images: Iterable[UnreadableImage]) -> str:
    """Return the number of images by cause, each with the first of them; empty without any."""
    counts = Tally()
    for image in images:
        counts.add(image.cause, image.where)
    return str(counts)

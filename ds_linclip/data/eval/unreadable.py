"""Held-out images that cannot be read: what they are, and how many there are of each cause."""

from collections.abc import Iterable
from typing import NamedTuple

from ds_linclip.data.causes import explain

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
    by_cause: dict[str, list[UnreadableImage]] = {}
    for image in images:
        by_cause.setdefault(image.cause, []).append(image)
    return "; ".join(
        f"{explain(cause)}: {len(found)} ({found[0].where}{', ...' if len(found) > 1 else ''})"
        for cause, found in by_cause.items()
    )

"""The embedded data set: captioned scans of handwritten digits.

``digits.npz`` holds the 1,797 scans of 8x8 pixels that scikit-learn's ``load_digits`` returns
(E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, CC BY 4.0), and the numbers of the scans to train on and of a stratified fifth
that is held out.
"""

import random
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
from PIL import Image

from ds_linclip.data.prepare.shard_writer import RawSample

__all__ = ["CLASSNAMES", "TEMPLATES", "digit_samples"]

CLASSNAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

#: Prompts for the held-out scans.
TEMPLATES = [
    "a handwritten digit {c}.",
    "the number {c} written by hand.",
    "a scan of the digit {c}.",
    "a photo of the number {c}.",
    "a small grey picture of the digit {c}.",
]

# {n} stands for the word or the numeral.
_CAPTIONS = [
    "a handwritten digit {n}",
    "the number {n} written by hand",
    "a scan of the digit {n}",
    "a photo of the number {n}",
    "a small grey picture of the digit {n}",
    "handwritten {n}",
    "the digit {n}, handwritten",
    "someone wrote the number {n}",
    "a low resolution scan of the number {n}",
    "this is the digit {n}",
    "number {n} in white ink on black",
    "an image of the digit {n} on a dark background",
]


def digit_samples(split: str, *, image_size: int, seed: int) -> Iterator[RawSample]:
    """Yield the scans of one split, shuffled, scaled up and captioned.

    Args:
        split: ``train`` or ``test``; which scans are held out does not depend on ``seed``.
        image_size: The side of the images in pixels.
        seed: The seed of the captions.
    """
    with files(__package__).joinpath("digits.npz").open("rb") as file:
        digits = dict(np.load(file))
    for number in digits[split].tolist():
        label = int(digits["labels"][number])
        grey = (digits["images"][number] * (255 / 16)).round().astype(np.uint8)
        image = Image.fromarray(grey).resize((image_size, image_size), Image.Resampling.BICUBIC)
        yield RawSample(
            image=image.convert("RGB"),
            caption=_caption(label, random.Random(f"{seed}/{number}")),
            url=f"sklearn.datasets.load_digits/{number}",
            original_size=(8, 8),
            label=label,
        )


def _caption(label: int, rng: random.Random) -> str:
    name = rng.choice([CLASSNAMES[label], CLASSNAMES[label], str(label)])
    text = rng.choice(_CAPTIONS).format(n=name)
    return text + rng.choice(["", "."])

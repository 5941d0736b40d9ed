"""Synthetic scenes: images of coloured shapes, with captions of their number, size and place.

They come in any number and image size, for load tests and for tests of compositionality: some pairs
of colour and shape never occur in training scenes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ds_linclip.data.prepare.shard_writer import RawSample

__all__ = ["CLASSNAMES", "TEMPLATES", "labelled_scenes", "training_scene"]

_COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 90, 220),
    "yellow": (240, 200, 20),
    "purple": (128, 50, 180),
    "brown": (130, 80, 35),
    "pink": (250, 130, 180),
    "black": (20, 20, 20),
}
_SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
_COUNTS = ("", "one", "two", "three")
_RADIUS = {"small": 0.05, "large": 0.095}  # of the image side
_PAIRS = [(colour, shape) for colour in _COLOURS for shape in _SHAPES]
_UNSEEN = {(colour, _SHAPES[i % len(_SHAPES)]) for i, colour in enumerate(_COLOURS)}
_SEEN = [pair for pair in _PAIRS if pair not in _UNSEEN]

# Words for the place of one group -> centre of its area, in image sides.
_PLACES = {
    "in the centre": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}
# Words between two groups -> centres of their areas.
_RELATIONS = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}

CLASSNAMES = [f"{colour} {shape}" for colour, shape in _PAIRS]

#: Prompt templates for the labelled scenes.
TEMPLATES = ["a {c}", "one small {c}", "one large {c}", "one large {c} in the centre"]


@dataclass(frozen=True)
class _Group:
    """One to three equal shapes."""

    count: int
    size: str
    colour: str
    shape: str

    def words(self) -> str:
        """Return the phrase that describes the group."""
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        return f"{_COUNTS[self.count]} {self.size} {self.colour} {self.shape}{plural}"


def training_scene(index: int, *, image_size: int, seed: int) -> RawSample:
    """Return a scene of one or two groups of shapes, the same for the same arguments."""
    rng = np.random.default_rng([seed, 0, index])
    if rng.random() < 0.5:
        group = _random_group(rng)
        place = _choice(rng, _PLACES)
        placed = [(group, _PLACES[place])]
        caption = f"{group.words()} {place}"
    else:
        first, second = _random_group(rng), _random_group(rng)
        relation = _choice(rng, _RELATIONS)
        placed = list(zip((first, second), _RELATIONS[relation], strict=True))
        caption = f"{first.words()} {relation} {second.words()}"
    return _sample(rng, placed, caption, f"scenes/{seed}/train/{index}", image_size)


def labelled_scenes(
    split: str, *, num_samples: int, image_size: int, seed: int
) -> Iterator[RawSample]:
    """Yield scenes of a single shape, labelled with its colour and shape.

    Args:
        split: ``test`` has the pairs that occur in training, ``test_unseen`` the others.
        num_samples: The number of scenes; the classes take turns.
        image_size: The side of the images in pixels.
        seed: The seed of everything but the classes.
    """
    stream, pairs = {"test": (1, _SEEN), "test_unseen": (2, sorted(_UNSEEN))}[split]
    for index in range(num_samples):
        rng = np.random.default_rng([seed, stream, index])
        colour, shape = pairs[index % len(pairs)]
        group = _Group(1, _choice(rng, _RADIUS), colour, shape)
        place = _choice(rng, _PLACES)
        caption, url = f"{group.words()} {place}", f"scenes/{seed}/{split}/{index}"
        label = _PAIRS.index((colour, shape))
        yield _sample(rng, [(group, _PLACES[place])], caption, url, image_size, label)


def _random_group(rng: np.random.Generator) -> _Group:
    colour, shape = _SEEN[int(rng.integers(len(_SEEN)))]
    return _Group(int(rng.integers(1, 4)), _choice(rng, _RADIUS), colour, shape)


def _choice(rng: np.random.Generator, words: Mapping[str, Any]) -> str:
    return list(words)[int(rng.integers(len(words)))]


def _sample(
    rng: np.random.Generator,
    placed: list[tuple[_Group, tuple[float, float]]],
    caption: str,
    url: str,
    image_size: int,
    label: int = -1,
) -> RawSample:
    """Draw a scene at twice its size, scale it down to smooth the edges, and add camera noise."""
    side = 2 * image_size
    shade = int(rng.integers(200, 256))
    image = Image.new("RGB", (side, side), (shade, shade, shade))
    draw = ImageDraw.Draw(image)
    for group, centre in placed:
        fill = _COLOURS[group.colour]
        for x, y in _positions(rng, group, centre):
            _draw_shape(draw, group.shape, (x * side, y * side), _RADIUS[group.size] * side, fill)
    image = image.resize((image_size, image_size), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + rng.normal(0, 4, pixels.shape).astype(np.float32)
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return RawSample(image, caption, url, (image_size, image_size), label)


def _positions(
    rng: np.random.Generator, group: _Group, centre: tuple[float, float]
) -> list[tuple[float, float]]:
    """Return positions on a ring around the centre, where equal shapes do not overlap."""
    if group.count == 1:
        ring = 0.05 * rng.random()
    else:
        # Neighbours on the ring are 2 ring sin(pi / count) apart, shapes up to 2.5 radii wide.
        ring = 1.3 * _RADIUS[group.size] / math.sin(math.pi / group.count)
    turn = rng.random() * 2 * math.pi
    angles = [turn + 2 * math.pi * i / group.count for i in range(group.count)]
    return [
        (centre[0] + ring * math.cos(angle), centre[1] + ring * math.sin(angle)) for angle in angles
    ]


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    fill: tuple[int, int, int],
) -> None:
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    if shape == "cross":
        arm = radius / 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        return
    # Number of corners, angle of the first one, distances from the centre in turn.
    corners, first, radii = {
        "square": (4, math.pi / 4, (1.2,)),
        "triangle": (3, -math.pi / 2, (1.1,)),
        "diamond": (4, 0.0, (0.75, 1.25)),
        "star": (10, -math.pi / 2, (1.2, 0.5)),
    }[shape]
    points = []
    for i in range(corners):
        angle = first + 2 * math.pi * i / corners
        reach = radius * radii[i % len(radii)]
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(points, fill=fill)

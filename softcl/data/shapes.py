"""The generated set `shapes`: groups of figures, 32x32 pixels, labelled by their shape.

Every image shows figures of one shape, its class. Texture, colour, size, place, rotation, contrast,
ground and noise, of the one in front and of its companions, are drawn independently of the class
and of each other.

Companions make the shape the one thing that any two crops of an image share, so that contrastive
learning has to find it, while pixels one by one say little about it. They are many and as small as
the one in front: every crop then has whole figures in it, and their places and shades, which could
tell one image from another without its shape, average out. Colours are faint for the same reason:
crops that could be matched by colour alone would teach nothing about shape.

Image `index` of a split and seed is a pure function of these three, whatever the size of the set,
and the splits use different streams of random numbers. A figure is a signed distance function in a
frame turned, scaled and moved with it; a pixel's coverage is clamp(1/2 - distance in pixels, 0, 1),
which gives antialiased edges. Everything per pixel is made of +, -, *, sqrt, floor, min and max,
which IEEE 754 rounds exactly: the result does not depend on the machine's vector units.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from softcl.data.image_set import STATISTICS, ImageSet
from softcl.data.stream import mix, words
from softcl.errors import DataError

SIDE = 32
TRAIN_SIZE = 10_000
LARGEST_SIZE = 10_000_000
TEST_SIZE = 2_000
SPLITS = ("train", "test")
CHUNK = 512  # images rendered together, so that their fields stay in cache

# Lengths in halves of the image's side, angles in radians, colours in [0, 1].
MIN_RADIUS, MAX_RADIUS = 0.28, 0.36
COMPANIONS, COMPANION_RADIUS = 12, (0.24, 0.34)
SPREAD = 0.5  # centres lie in [-SPREAD, SPREAD] both ways
MAX_ANGLE = np.pi / 6
CHROMA = (0.03, 0.08)
CLOUDS = 0.05
NOISE = 0.06

# ----------------------------------------------------------------------------- figures and patterns

# Functions of x and y, float32 arrays of one shape, in the figure's own frame: it fills most of
# [-1, 1] both ways, y downwards. A distance is negative inside; near corners it may be smaller than
# the Euclidean one, which only sharpens the corner.
Field = np.ndarray


def _hypot(x: Field, y: Field) -> Field:
    return np.sqrt(x * x + y * y)


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _lines(x: Field, y: Field, count: int, radius: float) -> list[Field]:
    """Signed distances to the `count` sides of a regular polygon of inradius `radius`."""
    angles = [2 * np.pi * k / count - np.pi / 2 for k in range(count)]
    return [
        x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) - np.float32(radius) for a in angles
    ]


def _star(x: Field, y: Field) -> Field:
    # A point of a pentagram violates at most one of the five sides: the second largest distance.
    first = second = np.full_like(x, -np.inf)
    for side in _lines(x, -y, 5, 0.35):
        second = np.maximum(second, np.minimum(first, side))
        first = np.maximum(first, side)
    return second


def _heart(x: Field, y: Field) -> Field:
    y = y + 0.1
    square = (np.abs(x) + np.abs(y)) * np.float32(np.sqrt(0.5)) - 0.55
    lobes = _hypot(np.abs(x) - 0.39, y + 0.39) - 0.55
    return np.minimum(square, lobes)


def _arrow(x: Field, y: Field) -> Field:
    head = np.maximum.reduce(_lines(x, -y - 0.35, 3, 0.4))
    return np.minimum(head, _box(x, y - 0.45, 0.24, 0.5))


def _hourglass(x: Field, y: Field) -> Field:
    waist = (np.abs(x) - np.abs(y) - 0.1) * np.float32(np.sqrt(0.5))
    return np.maximum(waist, np.abs(y) - 0.85)


FIGURES: dict[str, Callable[[Field, Field], Field]] = {
    "disk": lambda x, y: _hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(_hypot(x, y) - 0.68) - 0.22,
    "square": lambda x, y: _box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: np.maximum.reduce(_lines(x, 0.2 - y, 3, 0.55)),
    "star": _star,
    "plus": lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "crescent": lambda x, y: np.maximum(_hypot(x, y) - 0.95, 0.72 - _hypot(x - 0.45, y)),
    "heart": _heart,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
CLASSES = list(FIGURES)


def _fraction(u: Field) -> Field:
    return u - np.floor(u)


def _wave(u: Field) -> Field:
    """Triangle wave of period 1 in [-1, 1]."""
    return 4 * np.abs(_fraction(u) - 0.5) - 1


def _dots(x: Field, y: Field) -> Field:
    return 1.6 - 5 * _hypot(_fraction(1.5 * x) - 0.5, _fraction(1.5 * y) - 0.5)


# The share of the figure's second colour, to be clamped to [0, 1].
PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "stripes": lambda x, y: 0.5 + 2 * _wave(1.6 * y),
    "checks": lambda x, y: 0.5 + 4 * _wave(1.1 * x) * _wave(1.1 * y),
    "dots": _dots,
    "gradient": lambda x, y: 0.5 + 0.6 * x,
}


def _by_kind(functions: dict[str, Callable], kind: np.ndarray, x: Field, y: Field) -> Field:
    """Of each image (n, SIDE, SIDE) the function that kind (n,) numbers."""
    result = np.empty_like(x)
    for number, function in enumerate(functions.values()):
        rows = np.flatnonzero(kind == number)
        result[rows] = function(x[rows], y[rows])
    return result


# ------------------------------------------------------------------------------------------ drawing


class _Numbers:
    """Random numbers for the images of `index` (n,), with a stream for every use."""

    def __init__(self, seed: int, split: str, index: np.ndarray):
        self.seed, self.split, self.index = seed, SPLITS.index(split), index.astype(np.uint64)

    def words(self, use: str, count: int) -> np.ndarray:
        """(n, count) uint64."""
        use_number = zlib.crc32(use.encode())
        return words(mix(self.seed, self.split, use_number, self.index), count)

    def uniforms(self, use: str, count: int) -> np.ndarray:
        """(n, count) float64 in [0, 1)."""
        return (self.words(use, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def uniform(self, use: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(n,) float64 in [low, high)."""
        return low + (high - low) * self.uniforms(use, 1)[:, 0]

    def choice(self, use: str, number: int) -> np.ndarray:
        """(n,) int64 in [0, number)."""
        return np.floor(self.uniform(use) * number).astype(np.int64)

    def clouds(self) -> np.ndarray:
        """(n, 3, SIDE, SIDE) float32 in [-1, 1): bilinear between the points of a 5x5 lattice."""
        lattice = 2 * self.uniforms("lattice", 75).astype(np.float32).reshape(-1, 3, 5, 5) - 1
        position = (np.arange(SIDE, dtype=np.float32) + 0.5) * (4 / SIDE)
        nodes = np.arange(5, dtype=np.float32)
        weights = np.maximum(1 - np.abs(position[:, None] - nodes), 0).astype(np.float32)
        # Sums written out, because a matrix product may round differently from machine to machine.
        rows = sum(weights[:, k, None] * lattice[:, :, k, None, :] for k in range(5))
        return sum(rows[..., k, None] * weights[:, k] for k in range(5))

    def grain(self) -> np.ndarray:
        """(n, 3, SIDE, SIDE) float32 in [-1, 1], from a byte each."""
        octets = self.words("grain", 3 * SIDE * SIDE // 8).astype("<u8").view(np.uint8)
        return octets.reshape(-1, 3, SIDE, SIDE).astype(np.float32) * np.float32(2 / 255) - 1


def _each(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n, 1, 1) float32, to combine with fields."""
    return values.astype(np.float32).reshape(-1, 1, 1)


@dataclass
class _Figure:
    """One figure in each of n images: kinds are integers, lengths halves of the image's side."""

    shape: np.ndarray
    texture: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray
    hue: np.ndarray  # turns


def _fields(figure: _Figure, draw: _Numbers, name: str) -> tuple[Field, Field]:
    """Coverage and pattern of each pixel (n, SIDE, SIDE); the image spans [-1, 1], y downwards."""
    radius = _each(figure.radius)
    angle = draw.uniform(name + "rotation", -MAX_ANGLE, MAX_ANGLE)
    cos, sin = _each(np.cos(angle)), _each(np.sin(angle))
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * (2 / SIDE) - 1
    right, down = axis - _each(figure.x), axis[:, None] - _each(figure.y)
    right, down = right / radius, down / radius
    x, y = right * cos + down * sin, down * cos - right * sin
    distance = _by_kind(FIGURES, figure.shape, x, y)
    x += _each(draw.uniform(name + "pattern x"))
    y += _each(draw.uniform(name + "pattern y"))
    pattern = _by_kind(PATTERNS, figure.texture, x, y)
    coverage = np.clip(0.5 - distance * (radius * (SIDE / 2)), 0, 1)
    return coverage, np.clip(pattern, 0, 1, out=pattern)


def _color(lightness: np.ndarray, hue: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """RGB (n, 3, 1, 1): `lightness` plus a wave of amplitude `chroma` at `hue`, in turns."""
    wave = np.cos(2 * np.pi * (hue[:, None] - np.arange(3) / 3))
    return (lightness[:, None] + chroma[:, None] * wave).astype(np.float32)[:, :, None, None]


def _add(image: np.ndarray, ground: np.ndarray, figure: _Figure, draw: _Numbers, name: str) -> None:
    """Paint a figure over images (n, 3, SIDE, SIDE), in place; ground (n,) is their lightness."""
    coverage, pattern = _fields(figure, draw, name)
    # Lightness is drawn apart from hue, so that a figure stays visible in grey; the pattern's
    # second colour lies farther from the ground than the first.
    sign = np.where(draw.uniform(name + "darker") < 0.5, -1.0, 1.0)
    light = ground + sign * draw.uniform(name + "contrast", 0.25, 0.4)
    second = light + sign * draw.uniform(name + "pattern contrast", 0.15, 0.25)
    chroma = draw.uniform(name + "chroma", *CHROMA)
    first, other = _color(light, figure.hue, chroma), _color(second, figure.hue, chroma)
    image += coverage[:, None] * (first + pattern[:, None] * (other - first) - image)


def _companion(shape: np.ndarray, draw: _Numbers, name: str) -> _Figure:
    return _Figure(
        shape=shape,
        texture=draw.choice(name + "texture", len(PATTERNS)),
        radius=draw.uniform(name + "radius", *COMPANION_RADIUS),
        x=draw.uniform(name + "x", -0.85, 0.85),
        y=draw.uniform(name + "y", -0.85, 0.85),
        hue=draw.uniform(name + "hue"),
    )


def _front(shape: np.ndarray, draw: _Numbers) -> _Figure:
    """The figure in front: in one of 9 cells of the image, of one of 4 sizes and 8 hues, varied."""
    cell_y, cell_x = np.divmod(draw.choice("position", 9), 3)
    step = (MAX_RADIUS - MIN_RADIUS) / 4
    return _Figure(
        shape=shape,
        texture=draw.choice("texture", len(PATTERNS)),
        radius=MIN_RADIUS + step * (draw.choice("size", 4) + draw.uniform("radius")),
        x=SPREAD * ((cell_x + draw.uniform("x")) / 1.5 - 1),
        y=SPREAD * ((cell_y + draw.uniform("y")) / 1.5 - 1),
        hue=(draw.choice("color", 8) + draw.uniform("hue", 0.2, 0.8)) / 8,
    )


def render(seed: int, split: str, index: np.ndarray) -> np.ndarray:
    """Images of `index` (n,): uint8 (n, 3, SIDE, SIDE). The class of image i is i mod 10."""
    draw = _Numbers(seed, split, index)
    shape = index.astype(np.int64) % len(CLASSES)
    ground = draw.uniform("ground", 0.4, 0.6)
    image = draw.clouds() * CLOUDS
    image += _each(ground)[:, None]
    for k in range(COMPANIONS):
        name = f"companion {k} "
        _add(image, ground, _companion(shape, draw, name), draw, name)
    _add(image, ground, _front(shape, draw), draw, "")
    image += draw.grain() * _each(draw.uniform("noise", 0, NOISE))[:, None]
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def make_shapes(number: int, split: str = "train", *, seed: int = 0) -> ImageSet:
    """The first `number` images of split "train" or "test", resident, with labels."""
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    images = np.empty((number, 3, SIDE, SIDE), dtype=np.uint8)
    for start in range(0, number, CHUNK):
        index = np.arange(start, min(start + CHUNK, number))
        images[index] = render(seed, split, index)
    mean, std = STATISTICS["shapes"]
    return ImageSet(
        images=torch.from_numpy(images),
        labels=torch.arange(number) % len(CLASSES),
        classes=list(CLASSES),
        mean=mean,
        std=std,
        name=f"shapes ({split})",
        statistics="shapes",
        data_format="shapes",
    )


def load_shapes(spec: str, split: str) -> ImageSet:
    """The set that "shapes" or "shapes:N" names; split "train", "test" or "all"."""
    _, colon, count = spec.partition(":")
    if colon and not (re.fullmatch("[0-9]{1,8}", count) and 0 < int(count) <= LARGEST_SIZE):
        raise DataError(
            f"{spec[:200]}: write shapes or shapes:N with a positive number of training images, "
            f"{LARGEST_SIZE:,} at most"
        )
    sizes = {"train": int(count) if colon else TRAIN_SIZE, "test": TEST_SIZE}
    if split != "all":
        return make_shapes(sizes[split], split)
    train, test = (make_shapes(number, part) for part, number in sizes.items())
    train.images = torch.cat((train.images, test.images))
    train.labels = torch.cat((train.labels, test.labels))
    train.name = "shapes (all)"
    return train

"""The generated set `shapes`: groups of figures, 32x32 pixels, labelled by independent factors.

Every image shows figures of one shape, its class. The one in front is described by the factors
texture, colour, size and position, drawn independently of the class and of each other; the others,
its companions, have their own. Rotation, contrast, ground and noise are drawn too, without labels.

Companions make the shape the one thing that any two crops of an image share, so that contrastive
learning has to find it, while pixels one by one say little about it. They are many and as small as
the one in front: every crop then has whole figures in it, and their places and shades, which could
tell one image from another without its shape, average out. Colours are faint for the same reason:
crops that could be matched by colour alone would teach nothing about shape.

Image `index` of a split and seed is a pure function of these three, whatever the size of the set,
and the splits use different streams of random numbers. A figure is a signed distance function in a
frame turned, scaled and moved with it; a pixel's coverage is clamp(1/2 - distance in pixels, 0, 1),
which gives antialiased edges.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from softcl.data.counter import mix, uniforms, words
from softcl.data.figures import FIGURES, PATTERNS, Field
from softcl.data.image_set import STATISTICS, ImageSet

SIDE = 32
TRAIN_SIZE = 10_000
TEST_SIZE = 2_000
SPLITS = ("train", "test")
CHUNK = 512  # images rendered together, so that their fields stay in cache

CLASSES = list(FIGURES)
TEXTURES = list(PATTERNS)
COLORS = 8
SIZES = 4
POSITIONS = 9  # cells of a 3x3 grid, row by row

# Lengths in halves of the image's side, angles in radians, colours in [0, 1].
MIN_RADIUS, MAX_RADIUS = 0.28, 0.36
COMPANIONS, COMPANION_RADIUS = 12, (0.24, 0.34)
SPREAD = 0.5  # centres lie in [-SPREAD, SPREAD] both ways
MAX_ANGLE = np.pi / 6
CHROMA = (0.03, 0.08)
CLOUDS = 0.05
NOISE = 0.06


def _smooth(lattice: np.ndarray) -> np.ndarray:
    """Bilinear interpolation over the image of values on a 5x5 lattice: (n, 3, 5, 5)."""
    position = (np.arange(SIDE, dtype=np.float32) + 0.5) * (4 / SIDE)
    nodes = np.arange(5, dtype=np.float32)
    weights = np.maximum(1 - np.abs(position[:, None] - nodes), 0).astype(np.float32)  # (SIDE, 5)
    # Sums written out, because a matrix product may round differently from machine to machine.
    rows = sum(weights[:, k, None] * lattice[:, :, k, None, :] for k in range(5))
    return sum(rows[..., k, None] * weights[:, k] for k in range(5))


class _Numbers:
    """Random numbers for the images of `index` (n,), with a stream for every use."""

    def __init__(self, seed: int, split: str, index: np.ndarray):
        self.seed, self.split, self.index = seed, SPLITS.index(split), index.astype(np.uint64)

    def keys(self, use: str) -> np.ndarray:
        return mix(self.seed, self.split, zlib.crc32(use.encode()), self.index)

    def uniform(self, use: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(n,) float64 in [low, high)."""
        return low + (high - low) * uniforms(self.keys(use), 1)[:, 0]

    def choice(self, use: str, number: int) -> np.ndarray:
        """(n,) int64 in [0, number)."""
        return np.floor(self.uniform(use) * number).astype(np.int64)

    def lattice(self) -> np.ndarray:
        """(n, 3, 5, 5) float32 in [-1, 1)."""
        numbers = uniforms(self.keys("lattice"), 75).astype(np.float32)
        return 2 * numbers.reshape(-1, 3, 5, 5) - 1

    def grain(self) -> np.ndarray:
        """(n, 3, SIDE, SIDE) float32 in [-1, 1], from a byte each."""
        octets = words(self.keys("grain"), 3 * SIDE * SIDE // 8).astype("<u8").view(np.uint8)
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
    distance = np.empty_like(x)
    for label, shape in enumerate(CLASSES):
        rows = np.flatnonzero(figure.shape == label)
        distance[rows] = FIGURES[shape](x[rows], y[rows])
    x += _each(draw.uniform(name + "pattern x"))
    y += _each(draw.uniform(name + "pattern y"))
    pattern = np.empty_like(x)
    for label, texture in enumerate(TEXTURES):
        rows = np.flatnonzero(figure.texture == label)
        pattern[rows] = PATTERNS[texture](x[rows], y[rows])
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
        texture=draw.choice(name + "texture", len(TEXTURES)),
        radius=draw.uniform(name + "radius", *COMPANION_RADIUS),
        x=draw.uniform(name + "x", -0.85, 0.85),
        y=draw.uniform(name + "y", -0.85, 0.85),
        hue=draw.uniform(name + "hue"),
    )


def _main(factors: dict[str, np.ndarray], draw: _Numbers) -> _Figure:
    """The figure that the factors describe, varied within the class of each."""
    cell_y, cell_x = np.divmod(factors["position"], 3)
    step = (MAX_RADIUS - MIN_RADIUS) / SIZES
    return _Figure(
        shape=factors["shape"],
        texture=factors["texture"],
        radius=MIN_RADIUS + step * (factors["size"] + draw.uniform("radius")),
        x=SPREAD * ((cell_x + draw.uniform("x")) / 1.5 - 1),
        y=SPREAD * ((cell_y + draw.uniform("y")) / 1.5 - 1),
        hue=(factors["color"] + draw.uniform("hue", 0.2, 0.8)) / COLORS,
    )


def _paint(factors: dict[str, np.ndarray], draw: _Numbers) -> np.ndarray:
    """Images (n, 3, SIDE, SIDE) uint8."""
    ground = draw.uniform("ground", 0.4, 0.6)
    image = _smooth(draw.lattice()) * CLOUDS
    image += _each(ground)[:, None]
    for k in range(COMPANIONS):
        name = f"companion {k} "
        _add(image, ground, _companion(factors["shape"], draw, name), draw, name)
    _add(image, ground, _main(factors, draw), draw, "")
    image += draw.grain() * _each(draw.uniform("noise", 0, NOISE))[:, None]
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def render(seed: int, split: str, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images of `index` (n,), uint8 (n, 3, SIDE, SIDE), and their factors, int64 (n,), by name."""
    draw = _Numbers(seed, split, index)
    factors = {
        "shape": index.astype(np.int64) % len(CLASSES),
        "texture": draw.choice("texture", len(TEXTURES)),
        "color": draw.choice("color", COLORS),
        "size": draw.choice("size", SIZES),
        "position": draw.choice("position", POSITIONS),
    }
    return _paint(factors, draw), factors


def make_shapes(number: int, split: str = "train", *, seed: int = 0) -> ImageSet:
    """The first `number` images of split "train" or "test", resident, with labels and factors."""
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    images = np.empty((number, 3, SIDE, SIDE), dtype=np.uint8)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, number, CHUNK):
        index = np.arange(start, min(start + CHUNK, number))
        images[index], part = render(seed, split, index)
        parts.append(part)
    factors = {
        name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]
    }
    mean, std = STATISTICS["shapes"]
    return ImageSet(
        images=torch.from_numpy(images),
        labels=factors["shape"],
        classes=list(CLASSES),
        mean=mean,
        std=std,
        name=f"shapes ({split})",
        statistics="shapes",
        factors=factors,
        data_format="shapes",
    )

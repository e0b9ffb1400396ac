"""The generated set `shapes`: one figure on a background, 32x32, labelled by independent factors.

Image `index` of split and seed is a pure function of these three, whatever the size of the set. The
class is the figure; texture, colour, size and position are drawn independently of it and kept as
`factors`; rotation, background, contrast and noise are drawn too, without labels. The two splits use
different streams of random numbers.

Figures are signed distance functions d(x, y) in a frame turned, scaled and moved with the figure;
coverage of a pixel is clamp(1/2 - d in pixels, 0, 1), which gives antialiased edges. Pixels are made
with operations that IEEE 754 rounds exactly, so the result does not depend on the machine's vector
units.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from softcl.data.counter import mix, uniforms, words
from softcl.data.image_set import STATISTICS, ImageSet

SIDE = 32
TRAIN_SIZE = 10_000
TEST_SIZE = 2_000
CHUNK = 1024
STREAMS = {"train": 1, "test": 2}

Field = np.ndarray  # (n, SIDE, SIDE) float32


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


def _disk(x: Field, y: Field) -> Field:
    return _hypot(x, y) - 0.85


def _ring(x: Field, y: Field) -> Field:
    return np.abs(_hypot(x, y) - 0.68) - 0.22


def _square(x: Field, y: Field) -> Field:
    return _box(x, y, 0.76, 0.76)


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum.reduce(_lines(x, -y - 0.15, 3, 0.55))


def _star(x: Field, y: Field) -> Field:
    # A point of a pentagram violates at most one of the five sides: the second largest distance.
    first = second = np.full_like(x, -np.inf)
    for side in _lines(x, -y, 5, 0.4):
        second = np.maximum(second, np.minimum(first, side))
        first = np.maximum(first, side)
    return second


def _plus(x: Field, y: Field) -> Field:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _crescent(x: Field, y: Field) -> Field:
    return np.maximum(_hypot(x, y) - 0.95, 0.72 - _hypot(x - 0.45, y))


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
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "plus": _plus,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
CLASSES = list(FIGURES)
TEXTURES = ("plain", "stripes", "checks", "dots", "gradient")
COLORS = 8
SIZES = 4
POSITIONS = 9  # cells of a 3x3 grid, row by row


def _fraction(u: Field) -> Field:
    return u - np.floor(u)


def _texture(kind: np.ndarray, x: Field, y: Field) -> Field:
    """Pattern in [0, 1] of each image: how much of the figure's second colour a pixel takes."""
    result = np.zeros_like(x)
    for name, pattern in _PATTERNS.items():
        rows = np.flatnonzero(kind == TEXTURES.index(name))
        result[rows] = np.clip(pattern(x[rows], y[rows]), 0, 1)
    return result


def _wave(u: Field) -> Field:
    return (np.abs(_fraction(u) - 0.5) - 0.25) * 4  # triangle wave in [-1, 1]


_PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "stripes": lambda x, y: 2 * _wave(1.6 * y) + 0.5,
    "checks": lambda x, y: 4 * _wave(1.1 * x) * _wave(1.1 * y) + 0.5,
    "dots": lambda x, y: 1.6 - 5 * _hypot(_fraction(1.5 * x) - 0.5, _fraction(1.5 * y) - 0.5),
    "gradient": lambda x, y: 0.5 + 0.6 * x,
}


def _smooth_noise(lattice: np.ndarray) -> Field:
    """Bilinear interpolation of a 5x5 lattice (n, 5, 5) over the image."""
    position = (np.arange(SIDE, dtype=np.float32) + 0.5) * (4 / SIDE)
    nodes = np.arange(5, dtype=np.float32)
    weights = np.maximum(1 - np.abs(position[:, None] - nodes), 0).astype(np.float32)  # (SIDE, 5)
    rows = sum(weights[None, :, k, None] * lattice[:, None, k, :] for k in range(5))  # (n, SIDE, 5)
    return sum(rows[:, :, None, k] * weights[None, None, :, k] for k in range(5))


def _hue_direction(hue: np.ndarray) -> np.ndarray:
    """Unit-sized colour offsets (n, 3) of zero mean, hue (n,) in turns."""
    phase = np.array([0, 1, 2]) / 3
    return np.cos(2 * np.pi * (hue[:, None] - phase))


def render(seed: int, stream: int, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images of `index` (n,): uint8 (n, 3, SIDE, SIDE), and the int64 factors (n,) by name."""
    keys = mix(seed, stream, index.astype(np.uint64))
    u = uniforms(keys, 32)
    n = len(index)
    factor = {
        "shape": index.astype(np.int64) % len(CLASSES),
        "texture": np.floor(u[:, 0] * len(TEXTURES)).astype(np.int64),
        "color": np.floor(u[:, 1] * COLORS).astype(np.int64),
        "size": np.floor(u[:, 2] * SIZES).astype(np.int64),
        "position": np.floor(u[:, 3] * POSITIONS).astype(np.int64),
    }

    def single(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).reshape(n, 1, 1)

    # The figure's frame: position in the cell of a 3x3 grid, radius, rotation.
    radius = single(0.42 + 0.09 * (factor["size"] + u[:, 4]))
    cell_y, cell_x = np.divmod(factor["position"], 3)
    center_x = single(((cell_x + u[:, 5]) / 3 - 0.5) * 0.8)
    center_y = single(((cell_y + u[:, 6]) / 3 - 0.5) * 0.8)
    angle = (u[:, 7] - 0.5) * 2 * MAX_ANGLE
    cos, sin = single(np.cos(angle)), single(np.sin(angle))
    axis = ((np.arange(SIDE, dtype=np.float32) + 0.5) / (SIDE / 2) - 1).astype(np.float32)
    dx, dy = (axis[None, None, :] - center_x) / radius, (axis[None, :, None] - center_y) / radius
    x, y = dx * cos + dy * sin, dy * cos - dx * sin

    distance = np.empty((n, SIDE, SIDE), dtype=np.float32)
    for label, name in enumerate(CLASSES):
        rows = np.flatnonzero(factor["shape"] == label)
        distance[rows] = FIGURES[name](x[rows], y[rows])
    coverage = np.clip(0.5 - distance * (radius * (SIDE / 2)), 0, 1)[:, None]
    pattern = _texture(factor["texture"], x + single(u[:, 8]), y + single(u[:, 9]))[:, None]

    # Colours: lightness apart from hue, so that a figure stays visible in grey. The second colour
    # moves away from the background.
    sign = np.where(u[:, 10] < 0.5, -1.0, 1.0)
    contrast = 0.28 + 0.2 * u[:, 11]
    ground = 0.5 - sign * (0.08 + 0.2 * u[:, 12])
    figure = ground + sign * contrast
    second = figure + sign * (0.2 + 0.1 * u[:, 13])
    figure_hue = _hue_direction((factor["color"] + 0.2 + 0.6 * u[:, 14]) / COLORS)
    ground_hue = _hue_direction(u[:, 15])
    chroma = 0.12 + 0.1 * u[:, 16:18]

    def colour(lightness: np.ndarray, hue: np.ndarray, amount: np.ndarray) -> np.ndarray:
        return (lightness[:, None] + amount[:, None] * hue).astype(np.float32)[:, :, None, None]

    first = colour(figure, figure_hue, chroma[:, 0])
    other = colour(second, figure_hue, chroma[:, 0])
    back = colour(ground, ground_hue, chroma[:, 1])
    lattice = uniforms(mix(seed, stream, 16 + STREAM_LATTICE, index.astype(np.uint64)), 25)
    cloud = _smooth_noise(lattice.astype(np.float32).reshape(n, 5, 5) - 0.5)[:, None]
    back = back + cloud * single(0.35 * u[:, 18])[:, None]
    image = back + coverage * (first + pattern * (other - first) - back)
    image += (_grain(seed, stream, index) - 0.5) * single(0.16 * u[:, 19])[:, None]
    pixels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels, factor


STREAM_LATTICE, STREAM_GRAIN = 1, 2
MAX_ANGLE = np.pi / 6


def _grain(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Noise in [0, 1] per pixel and channel: (n, 3, SIDE, SIDE), eight bytes from every 64-bit word."""
    keys = mix(seed, stream, 16 + STREAM_GRAIN, index.astype(np.uint64))
    octets = words(keys, 3 * SIDE * SIDE // 8).astype("<u8").view(np.uint8)
    return octets.reshape(-1, 3, SIDE, SIDE).astype(np.float32) * np.float32(1 / 255)


def make_shapes(number: int, split: str = "train", *, seed: int = 0) -> ImageSet:
    """The first `number` images of a split ("train" or "test"), resident, with labels and factors."""
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if split not in STREAMS:
        raise ValueError(f"split must be one of {', '.join(STREAMS)}, got {split!r}")
    images = np.empty((number, 3, SIDE, SIDE), dtype=np.uint8)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, number, CHUNK):
        index = np.arange(start, min(start + CHUNK, number))
        images[index], part = render(seed, STREAMS[split], index)
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
    )

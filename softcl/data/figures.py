"""The figures of the set `shapes` as signed distances, and the patterns that fill them.

Functions of x and y, float32 arrays of one shape, in the figure's own frame: it fills most of
[-1, 1] both ways, y downwards. A distance is negative inside; near corners it may be smaller
than the Euclidean one, which only sharpens the corner. Everything per pixel is made of +, -, *,
sqrt, floor, min and max, which IEEE 754 rounds exactly: the result does not depend on the machine's
vector units.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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


def _disk(x: Field, y: Field) -> Field:
    return _hypot(x, y) - 0.85


def _ring(x: Field, y: Field) -> Field:
    return np.abs(_hypot(x, y) - 0.68) - 0.22


def _square(x: Field, y: Field) -> Field:
    return _box(x, y, 0.76, 0.76)


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum.reduce(_lines(x, 0.2 - y, 3, 0.55))


def _star(x: Field, y: Field) -> Field:
    # A point of a pentagram violates at most one of the five sides: the second largest distance.
    first = second = np.full_like(x, -np.inf)
    for side in _lines(x, -y, 5, 0.35):
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


def _fraction(u: Field) -> Field:
    return u - np.floor(u)


def _wave(u: Field) -> Field:
    """Triangle wave of period 1 in [-1, 1]."""
    return 4 * np.abs(_fraction(u) - 0.5) - 1


def _plain(x: Field, y: Field) -> Field:
    return np.zeros_like(x)


def _stripes(x: Field, y: Field) -> Field:
    return 0.5 + 2 * _wave(1.6 * y)


def _checks(x: Field, y: Field) -> Field:
    return 0.5 + 4 * _wave(1.1 * x) * _wave(1.1 * y)


def _dots(x: Field, y: Field) -> Field:
    return 1.6 - 5 * _hypot(_fraction(1.5 * x) - 0.5, _fraction(1.5 * y) - 0.5)


def _gradient(x: Field, y: Field) -> Field:
    return 0.5 + 0.6 * x


# The share of the figure's second colour, to be clamped to [0, 1].
PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "gradient": _gradient,
}

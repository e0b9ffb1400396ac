"""Grey values of more than 8 bits: one scale for all images of a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class White(NamedTuple):
    """The values that become white in grey images of more than 8 bits: one scale for a set.

    whole:    of those with whole numbers
    floating: of the others
    """

    whole: float = 65535.0
    floating: float = 1.0


USUAL = White()


def scale_of(largest: Mapping[bool, float]) -> tuple[White, list[str]]:
    """The scale of a set, from the largest value found in images of whole numbers (False) and of
    floating ones (True); and lines about it.

    Whole numbers: all ones in as many bits as it takes, at least eight. Floating ones: 1, or up to
    2 what is larger than that; above 2 they are whole numbers stored as floating ones.
    """
    whole, floating = largest.get(False, USUAL.whole), largest.get(True, 0.0)
    white = White(_ones(whole), max(floating, 1.0) if floating <= 2 else _ones(floating))
    return white, [
        f"grey images of {'floating-point numbers' if kind else 'more than 8 bits'}: the largest "
        f"is {value:g}, and {white[kind]:g} is white in all of them"
        for kind, value in sorted(largest.items())
    ]


def _ones(number: float) -> float:
    return 2.0 ** max(int(number).bit_length(), 8) - 1


def eight_bits(values: np.ndarray, white: White) -> np.ndarray:
    """Whole or floating numbers as uint8; below 0 they are black, beyond white they are white."""
    full = white.floating if values.dtype.kind == "f" else white.whole
    scaled = np.nan_to_num(values.astype(np.float64)) * (255.0 / full) + 0.5
    return np.clip(scaled, 0, 255).astype(np.uint8)

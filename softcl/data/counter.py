"""Counter-based random numbers: pure functions of integers, the same on every machine.

A stream has a 64-bit key made by `mix` from integers (seed, epoch, index, ...). Its i-th word is
the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) applied to key + (i + 1) * GOLDEN.
Nothing has to be drawn in order, so a sample never depends on how many others were made.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalise(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Keys (uint64) from integers or integer arrays that broadcast; the order of values matters.

    Negative integers are taken modulo 2^64.
    """
    key = np.zeros(1, dtype=np.uint64)
    for value in values:
        if isinstance(value, int):
            value = np.array([value % 2**64], dtype=np.uint64)
        key = _finalise(key + np.asarray(value).astype(np.uint64) + GOLDEN)
    return key


def words(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of each stream: keys (n,) uint64 -> (n, count) uint64."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return _finalise(keys[:, None] + steps)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of each stream: keys (n,) -> (n, count) float64."""
    return (words(keys, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

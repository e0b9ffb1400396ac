"""What is known of each image of a set, in a few bytes for each: names, and words out of few."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

_CODE = ("utf-8", "surrogateescape")  # names of files may be any bytes


class Names(Sequence[str]):
    """Names of files, in UTF-8, one after the other.

    Args:
        text: uint8, the bytes of all of them.
        starts, lengths: (n,) int64 and int32: where in them each one lies.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.text, self.starts, self.lengths = text, starts, lengths

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        text, lengths = bytearray(), array.array("i")
        for name in names:
            encoded = name.encode(*_CODE)
            text += encoded
            lengths.append(len(encoded))
        sizes = np.array(lengths, np.int32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        return cls(np.frombuffer(text, np.uint8), starts, sizes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: int) -> str:
        start = self.starts[place]
        return self.text[start : start + self.lengths[place]].tobytes().decode(*_CODE)

    def __iter__(self) -> Iterator[str]:
        text = memoryview(self.text)
        for start, length in zip(self.starts, self.lengths, strict=True):
            yield str(text[start : start + length], *_CODE)

    def take(self, places: np.ndarray) -> Names:
        return Names(self.text, self.starts[places], self.lengths[places])


class Words(Sequence[Any]):
    """Words, numbers or None, of which many are the same.

    Args:
        values: each one once, in the order in which they were met.
        codes: (n,) int32, places among the values.
    """

    def __init__(self, values: list[Any], codes: np.ndarray) -> None:
        self.values, self.codes = values, codes

    @classmethod
    def of(cls, words: Iterable[Any]) -> Words:
        if isinstance(words, cls):
            return words
        known: dict[Any, int] = {}
        codes = array.array("i", (known.setdefault(word, len(known)) for word in words))
        return cls(list(known), np.array(codes, np.int32))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, place: int) -> Any:
        return self.values[self.codes[place]]

    def take(self, places: np.ndarray) -> Words:
        return Words(self.values, self.codes[places])

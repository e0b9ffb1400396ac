"""Image files decoded when they are asked for: as centred squares, or as random crops of the whole.

Which pixels come out is a function of what is asked for: the number of threads and what was read
before change nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from softcl.data import decode
from softcl.data.image_set import Cut, DataError
from softcl.data.listing import Listing, printable
from softcl.data.recipe import draw_box

UNREADABLE_LIMIT = 0.01
_T = TypeVar("_T")


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error)).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def refuse_if_many(root: Path, skipped: list[str], total: int) -> None:
    """Raise DataError where more than UNREADABLE_LIMIT of the images cannot be read."""
    if len(skipped) > UNREADABLE_LIMIT * total:
        first = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        raise DataError(
            f"{printable(root)}: {len(skipped)} of {total} images cannot be read "
            f"(1% is allowed): {first}"
        )


class LazyImages:
    """Images decoded when they are asked for, by a pool of threads, or by the caller's alone.

    A file that turns out unreadable is replaced by the next one of the same class, listed in
    `skipped`; more than 1 % of them raise DataError.

    Args:
        size: (height, width) of the centred part that `batch` gives.
        workers: threads; 0 for none.
        skipped: the list that unreadable files are added to; None for a new one.
    """

    def __init__(
        self,
        listing: Listing,
        size: tuple[int, int],
        workers: int,
        skipped: list[str] | None = None,
    ) -> None:
        self.listing, self.size = listing, size
        self.root, self.files, self.labels = listing.root, listing.files, listing.labels
        self.skipped: list[str] = list(listing.skipped) if skipped is None else skipped
        self._broken: set[int] = set()
        self._lock = threading.Lock()
        self.workers = workers
        self._pool = None
        if workers:
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="softcl-decode")

    def __len__(self) -> int:
        return len(self.files)

    def _mark_broken(self, index: int, error: Exception) -> None:
        with self._lock:
            if index not in self._broken:
                self._broken.add(index)
                self.skipped.append(f"{printable(self.files[index])}: {reason_of(error)}")
        refuse_if_many(self.root, self.skipped, len(self))

    def _read(self, index: int, read: Callable[[Path | BinaryIO], _T]) -> _T:
        """What `read` makes of a file, or of the one that stands in for it."""
        label = self.labels[index] if self.labels else None
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if step and label is not None and self.labels[candidate] != label:
                continue
            if candidate in self._broken:
                continue
            try:
                return read(self.listing.open(candidate))
            except Exception as error:
                self._mark_broken(candidate, error)
        raise DataError(f"{printable(self.root)}: no readable image to replace {self.files[index]}")

    def _on_threads(self, function: Callable[[int, int], None], indices: list[int]) -> None:
        """Call `function` with the place and the value of each index."""
        call_all = map if self._pool is None else self._pool.map
        for _ in call_all(function, range(len(indices)), indices):
            pass

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Centred parts of the images of indices (N,): uint8 (N, 3, H, W), in that order."""
        result = torch.empty((len(indices), 3, *self.size), dtype=torch.uint8)
        array = result.numpy()

        def read(place: int, index: int) -> None:
            array[place] = self._read(index, lambda file: decode.decode(file, *self.size))

        self._on_threads(read, indices.tolist())
        return result

    def crops(self, indices: torch.Tensor, cuts: Mapping[str, Cut]) -> dict[str, torch.Tensor]:
        """Random crops of the whole images of indices (N,): uint8 (N, 3, side, side) of each cut.

        A file is decoded once, whatever the number of cuts. The box of row i is that of
        `recipe.draw_box` for row i of the cut's numbers and the image's own height and width.
        """
        shape = (len(indices), 3)
        result = {
            name: torch.empty((*shape, cut.side, cut.side), dtype=torch.uint8)
            for name, cut in cuts.items()
        }
        arrays = [crops.numpy() for crops in result.values()]
        drawn = [(cut, cut.numbers.tolist()) for cut in cuts.values()]

        def read(place: int, index: int) -> None:
            def draw(height: int, width: int) -> list[decode.Box]:
                return [
                    decode.Box(*draw_box(rows[place], height, width, cut.recipe), cut.side)
                    for cut, rows in drawn
                ]

            made = self._read(index, lambda file: decode.decode_crops(file, draw))
            for array, crop in zip(arrays, made, strict=True):
                array[place] = crop

        self._on_threads(read, indices.tolist())
        return result

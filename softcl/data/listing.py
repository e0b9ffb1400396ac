"""The images of a split before they are decoded: names, labels, and where their bytes are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from softcl.data.image_set import DataError
from softcl.data.splits import HOLD_OUT, held_out


def printable(path: str | Path) -> str:
    """The path as one line of text, whatever bytes its name holds."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass
class Listing:
    """Image files of one split, relative to `root`, with their labels where there are any.

    skipped: "name: reason" for what could not even be listed.
    """

    root: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def open(self, index: int) -> Path | BinaryIO:
        """What an image decoder reads: a path, or a file in memory."""
        return self.root / self.files[index]

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out all images but those at `positions`."""
        self.files = [self.files[place] for place in positions]
        if self.labels is not None:
            self.labels = [self.labels[place] for place in positions]


@dataclass
class PackedListing(Listing):
    """Images inside larger files; `files` are names for messages.

    places: for each image, which container and where in it.
    """

    containers: list[Path] = field(default_factory=list)
    places: list[tuple[int, ...]] = field(default_factory=list)

    def keep(self, positions: Sequence[int]) -> None:
        super().keep(positions)
        self.places = [self.places[place] for place in positions]

    def set_labels(self, labels: Sequence[int | None], names: Sequence[str] = ()) -> None:
        """Take the labels if every image has one; classes without a name are called by number."""
        known = [label for label in labels if label is not None]
        if not known:
            return
        if len(known) < len(labels):
            missing = len(labels) - len(known)
            self.notes.append(f"{missing} of {len(labels)} images have no label: no labels")
            return
        self.labels = known
        numbers = map(str, range(len(names), max(known) + 1))
        self.classes = [*names, *numbers]

    def hold_out(self, split: str, kind: str) -> None:
        """Keep the part that belongs to `split` of a set that no file name divides.

        Raises:
            DataError: there are no labels, or too few images, to hold some out.
        """
        if split == "all" or (self.labels is None and split == "train"):
            return
        if self.labels is None:
            raise DataError(
                f"{printable(self.root)}: no {kind} has test or val in its name, and there are no "
                "labels to hold images out by"
            )
        self.keep(held_out(self.labels, split))
        if not self.files:
            raise DataError(f"{printable(self.root)}: too few images for split {split!r}")
        self.notes.append(
            f"no {kind} has test or val in its name: every {HOLD_OUT}th image of a class is held "
            "out for test"
        )

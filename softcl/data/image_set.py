"""What a set of images is: listed, read, and how its pixels are normalised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch

from softcl.data.columns import Names, Words
from softcl.data.recipe import Recipe
from softcl.memory import moved

if TYPE_CHECKING:
    from softcl.data.decode import LazyImages

Triple = tuple[float, float, float]
Stamp = tuple[int, int, int]
Reader = Callable[[Path, int, int], BinaryIO]
LONGEST = 300  # characters of a path in a message


# Per-channel mean and standard deviation of pixels in [0, 1].
STATISTICS: dict[str, tuple[Triple, Triple]] = {
    # The constants of ASCL's released code (MrChenFeng/ASCL_ICPR2022) for its four small sets.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    # torchvision's constants for ImageNet-1k; also the choice for a set without a row here.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Measured on the first 20,000 training images of `shapes`, seed 0.
    "shapes": ((0.5, 0.5, 0.5), (0.233, 0.233, 0.233)),
}


def printable(path: str | Path) -> str:
    """The path as one line of text, whatever bytes its name holds and however long it is."""
    text = os.fsencode(path).decode("utf-8", "replace")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


class Arrays(NamedTuple):
    """A split whose files hold raw pixels.

    images: (M, 3, H, W) uint8
    labels: (M,) int64, -1 where an image has none, or None
    statistics: the row of STATISTICS, or None if none is known
    notes: lines worth printing
    """

    images: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    statistics: str | None
    notes: Sequence[str] = ()


@dataclass
class Listing:
    """Image files of a set, not decoded yet: a name, a part and a label of each.

    files:      their names, below `root`
    parts:      "train", "test" or "val", or "" where nothing says so; another folder's name where
                the set is divided and they are in none of its parts
    labels:     their classes as words or numbers, None where there is none; of a chosen split the
                numbers, (n,) int64, or None
    names:      of the classes whose labels are numbers
    notes:      lines worth printing about how the set was read
    left_out:   how many other files there are of each kind
    lost:       "file: reason" of what is missing from a file that holds images, and of how many
    containers: the files that images lie in, if they are no files of their own
    places:     then int64 (n, 3): in which of the containers each lies, and two numbers for `read`
    unit:       how many columns of `places` name what is best read in one go, a shard; 0 for none
    read:       from a container and the two numbers to the bytes of an image file
    statistics: the row of STATISTICS that the set is known to need, or None
    why_unlabelled: what to say where no image has a label
    sources:    what the listing depends on, by path: `walk.stamp` of folders, containers and tables
                from before they were read; without any it is not kept
    """

    root: Path
    files: Names
    parts: Words
    labels: Words | np.ndarray | None
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: dict[str, int] = field(default_factory=dict)
    containers: list[Path] = field(default_factory=list)
    places: np.ndarray | None = None
    unit: int = 0
    read: Reader | None = None
    statistics: str | None = None
    why_unlabelled: str = ""
    sources: dict[str, Stamp] = field(default_factory=dict)

    def open(self, index: int) -> Path | BinaryIO:
        """What an image decoder reads: a path, or a file in memory."""
        if self.places is None:
            return self.root / self.files[index]
        container, *where = self.places[index].tolist()
        return self.read(self.containers[container], *where)

    def paths(self) -> list[str]:
        """The files on the disk that its images lie in."""
        if self.places is None:
            root = os.fspath(self.root)
            return [os.path.join(root, name) for name in self.files]
        return [os.fspath(self.containers[place]) for place in np.unique(self.places[:, 0])]

    def shards(self) -> tuple[int, ...] | None:
        """The first image of each of its shards; None where it has none."""
        if not self.unit:
            return None
        units = self.places[:, : self.unit]
        return (0, *(np.flatnonzero((units[1:] != units[:-1]).any(1)) + 1).tolist())

    def only(self, places: Sequence[int] | np.ndarray) -> Listing:
        """The same set without all images but those at `places`."""
        places = np.asarray(places, np.int64)
        return replace(
            self,
            files=self.files.take(places),
            parts=self.parts.take(places),
            labels=None if self.labels is None else self.labels.take(places),
            places=None if self.places is None else self.places[places],
        )


class Cut(NamedTuple):
    """Random crops of a batch of image files, for one of its views.

    side:    of the crops, in pixels
    recipe:  the ranges of their areas and ratios
    numbers: (N, CROP_COLUMNS) in [0, 1), from which the boxes are drawn
    """

    side: int
    recipe: Recipe
    numbers: torch.Tensor


class CropOrder(NamedTuple):
    """What is to be cut of which images: indices (N,), and a cut for each view by its name."""

    indices: torch.Tensor
    cuts: Mapping[str, Cut]


Wanted = torch.Tensor | CropOrder  # images by their indices (N,), or crops of their files
Pixels = torch.Tensor | dict[str, torch.Tensor]


@dataclass
class ImageSet:
    """Images with optional labels.

    images:     uint8 tensor (M, 3, H, W) when resident, else an object that decodes on demand
    labels:     int64 (M,), -1 where an image has none, or None where none has
    classes:    names of the classes, in the order of the labels; empty without labels
    mean, std:  normalisation constants for pixels in [0, 1]
    statistics: the row of STATISTICS they come from, or in words where else
    skipped:    "path: reason" for each unreadable image left out
    notes:      lines worth printing about how the set was read
    data_format: how it is stored, a word of FORMATS
    files:      where `images` are centred squares, what cuts crops of the whole image files
    listing:    of image files, their names
    shards:     the first image of each larger file, or part of one, where a run reads one at a time
    """

    images: torch.Tensor | LazyImages
    labels: torch.Tensor | None
    classes: list[str]
    mean: Triple
    std: Triple
    name: str
    statistics: str = "imagenet"
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data_format: str = "folder"
    files: LazyImages | None = None
    listing: Listing | None = None
    shards: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resident(self) -> bool:
        return isinstance(self.images, torch.Tensor)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the stored images."""
        return tuple(self.images.shape[-2:]) if self.resident else self.images.size

    @property
    def names(self) -> list[str]:
        """The path of every image below its set's, or its number where pixels have no files."""
        if self.listing is None:
            return [str(number) for number in range(len(self))]
        return [printable(name) for name in self.listing.files]

    def only(self, places: torch.Tensor) -> ImageSet:
        """The images of some places (n,), with their labels."""
        listed = places.tolist()
        images = self.images[places] if self.resident else self.images.only(listed)
        files = None if self.files is None else self.files.only(listed)
        listing = None if self.listing is None else self.listing.only(listed)
        labels = None if self.labels is None else self.labels[places]
        return replace(
            self, images=images, labels=labels, files=files, listing=listing, shards=None
        )

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """The images of `indices` (N,), on any device: uint8 (N, 3, H, W)."""
        if self.resident:
            return self.images.index_select(0, moved(indices, self.images.device))
        return self.images.batch(indices.cpu())

    def read(self, wanted: Wanted) -> Pixels:
        """The images of some indices, or crops of their files."""
        if isinstance(wanted, torch.Tensor):
            return self.batch(wanted)
        return self.files.crops(wanted.indices.cpu(), wanted.cuts)

    def labelled(self) -> ImageSet:
        """The set without the images that have no label; itself where all have one or none has."""
        if self.labels is None or bool((self.labels >= 0).all()):
            return self
        return self.only((self.labels >= 0).nonzero().flatten())

    def to(self, device: torch.device | str) -> ImageSet:
        """Move a resident set's images; a set decoded on demand stays where it is. Returns self."""
        if self.resident:
            self.images = self.images.to(device)
        return self

    def describe(self) -> str:
        """One line for a log: how many images, their size, where they are, how normalised."""
        height, width = self.size
        resident = f"{self.images.numel() / 1e6:.0f} MB in memory" if self.resident else ""
        parts = [
            f"{self.name}: {len(self)} images",
            f"{width}x{height}",
            self.data_format,
            resident or "decoded on demand",
            "crops of the whole files" if self.files is not None else "",
            f"{len(self.classes)} classes" if self.labels is not None else "no labels",
            f"normalised as {self.statistics}",
            f"{len(self.skipped)} unreadable skipped" if self.skipped else "",
        ]
        return ", ".join(filter(None, parts))

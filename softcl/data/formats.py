"""How a data set is stored: the formats, and how a path is recognised as one of them.

In the order in which they are tried:

    cifar            CIFAR-10 or CIFAR-100, python or binary layout             softcl/data/cifar.py
    stl10            STL-10, binary                                             stl10.py
    tiny-imagenet    Tiny-ImageNet-200, the labels of val/ in a text file       tiny_imagenet.py
    tar              WebDataset shards, or one                                  shards.py
    parquet          parquet files with a column of images, or one              parquet.py
    folder           image files, with or without class subfolders and splits   folder.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcl.data import cifar, folder, parquet, shards, stl10, tiny_imagenet
from softcl.data.image_set import DataError
from softcl.data.listing import Listing, printable

FORMATS = ("auto", "shapes", "cifar", "stl10", "tiny-imagenet", "tar", "parquet", "folder")

# The formats that hold image files: from the place that `find` gives, and a split, to a listing.
LISTINGS: dict[str, Callable[[Path, str], Listing]] = {
    "tiny-imagenet": tiny_imagenet.list_images,
    "tar": shards.list_images,
    "parquet": parquet.list_images,
    "folder": folder.list_folder,
}


@dataclass(frozen=True)
class Found:
    """A recognised data set.

    root:       the path that was given
    format:     a word of FORMATS
    place:      what the format's reader takes
    statistics: the row of STATISTICS that the format is known to need, or None
    """

    root: Path
    format: str
    place: Any
    statistics: str | None = None


def find(root: Path, wanted: str = "auto") -> Found:
    """Recognise `root`, as the format `wanted` or as the first that fits.

    Raises:
        DataError: the path is missing, or is nothing of the wanted format.
    """
    if wanted not in FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(FORMATS)}, got {wanted!r}")
    if wanted == "folder" or not root.exists():
        return Found(root, "folder", root)  # whose reader says what is wrong with the path
    for name, look in (("cifar", _cifar), ("stl10", _stl10), ("tiny-imagenet", _tiny)):
        if wanted in ("auto", name):
            found = look(root)
            if found is not None:
                return found
    for name, look_for_files in (("tar", shards.find), ("parquet", parquet.find)):
        if wanted == name and not look_for_files(root):
            break
        if wanted == name or (wanted == "auto" and _holds(root, f".{name}")):
            return Found(root, name, root)
    if wanted == "auto":
        return Found(root, "folder", root)
    raise DataError(f"{printable(root)}: nothing of format {wanted} here")


def _cifar(root: Path) -> Found | None:
    found = cifar.find(root) if root.is_dir() else None
    return None if found is None else Found(root, "cifar", found, found[1].statistics)


def _stl10(root: Path) -> Found | None:
    place = stl10.find(root) if root.is_dir() else None
    return None if place is None else Found(root, "stl10", place, "stl10")


def _tiny(root: Path) -> Found | None:
    place = tiny_imagenet.find(root) if root.is_dir() else None
    return None if place is None else Found(root, "tiny-imagenet", place, "tiny")


def _holds(root: Path, suffix: str) -> bool:
    """Whether a path is a container file, or a folder with some at its top or one level below.

    Deeper ones are not looked for unless the format is asked for: a folder of a million images
    would have to be walked.
    """
    if root.is_file():
        return root.suffix == suffix
    folders = [root, *(entry for entry in sorted(root.iterdir())[:50] if entry.is_dir())]
    return any(True for part in folders for _ in part.glob(f"*{suffix}"))

"""From a name or a path to an `ImageSet`, resident where it fits in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softcl.data import arrays, decode, folder, packed
from softcl.data.image_set import STATISTICS, Arrays, DataError, ImageSet, Listing, printable
from softcl.data.shapes import load_shapes

SMALL = 128  # images of one size up to this many pixels a side are kept as they are
DEFAULT_SIZE = 224
PROBES = 64  # files looked at to learn the images' size
UNLABELED = ("unlabeled", "train+unlabeled")
SPLITS = ("train", "test", "all", *UNLABELED)


@dataclass(frozen=True)
class Format:
    """How the sets of one kind are stored.

    read:      from a path and a split to a `Listing` of image files, or to `Arrays` of raw pixels
    signs:     what it is recognised by: patterns of the names of files that lie in one folder; all
               of one group must be there
    container: the path is read with all that lies below it; else the folder that has the signs is
    unlabeled: whether it has the splits of UNLABELED, the last of which is meant for training
    """

    read: Callable[[Path, str], Listing | Arrays]
    signs: tuple[tuple[str, ...], ...]
    container: bool = False
    unlabeled: bool = False


# In the order in which they are tried.
READERS: dict[str, Format] = {
    "cifar": Format(arrays.read_cifar, arrays.CIFAR_SIGNS),
    "stl10": Format(arrays.read_stl10, arrays.STL10_SIGNS, unlabeled=True),
    "tiny-imagenet": Format(folder.list_tiny_imagenet, folder.TINY_SIGNS),
    "tar": Format(packed.list_tar, (("*.tar",),), container=True),
    "parquet": Format(packed.list_parquet, (("*.parquet",),), container=True),
    "folder": Format(folder.list_folder, ((),), container=True),
}
FORMATS = ("auto", "shapes", *READERS)


@dataclass(frozen=True)
class Found:
    """A recognised set: a key of READERS, and what its reader takes."""

    format: str
    place: Path


def find_format(root: Path, wanted: str = "auto") -> Found:
    """Recognise `root`, as the format `wanted` or as the first that fits.

    Signs are looked for in a folder and one level below it; deeper ones only of a format that is
    asked for, because a folder of a million images would have to be walked.

    Raises:
        DataError: the path is nothing of the wanted format.
    """
    if wanted not in FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(FORMATS)}, got {wanted!r}")
    if not root.exists():
        return Found("folder", root)  # whose reader says what is wrong with the path
    try:
        parts = [root, *(entry for entry in sorted(root.iterdir())[:50] if entry.is_dir())]
    except OSError:  # a file; or the reader of folders says what is wrong
        parts = [root]
    for name, stored in READERS.items():
        if wanted in ("auto", name):
            place = _place(root, parts, stored, deep=wanted == name)
            if place is not None:
                return Found(name, place)
    raise DataError(f"{printable(root)}: nothing of format {wanted} here")


def _place(root: Path, parts: list[Path], stored: Format, deep: bool) -> Path | None:
    """What the format's reader takes, or None if `root` is nothing of it."""
    if root.is_file():
        matches = any(all(map(root.match, group)) for group in stored.signs)
        return root if matches and stored.container else None
    if () in stored.signs:
        return root
    for part in parts:
        for group in stored.signs:
            if all(any(f.is_file() for f in part.glob(pattern)) for pattern in group):
                return root if stored.container else part
    if deep and stored.container and any(any(root.rglob(*group)) for group in stored.signs):
        return root
    return None


def is_generated(spec: str) -> bool:
    """Whether `spec` names the generated set."""
    return spec == "shapes" or spec.startswith("shapes:")


def load_dataset(
    spec: str,
    split: str = "train",
    *,
    image_size: int | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    data_format: str = "auto",
) -> ImageSet:
    """The data set that `spec` names.

    spec          "shapes"; "shapes:N" for N training images (the test split has always 2,000); or
                  a path ("./shapes" for a folder of that name)
    split         "train", "test" or "all"; for STL-10 also "unlabeled" and "train+unlabeled"
    image_size    pixels a side to store image files in, unless they all have one size that is no
                  larger; default 224, where images of one size up to 128 pixels are kept. Others
                  are stored as centred squares, and `ImageSet.files` crops the whole images. Sets
                  of raw pixels keep their size.
    memory_limit  bytes of pixels above which images are decoded on demand; default a quarter of
                  the machine's memory
    workers       threads that decode; default the cores, at most 16; 0 for the caller's own alone
    data_format   a word of FORMATS

    Raises DataError, one line that names the path, where the data cannot be read; ImportError,
    naming the extra, without pillow.
    """
    if split not in SPLITS:
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split must be one of {known}, got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    generated = is_generated(spec) and data_format in ("auto", "shapes")
    root = Path(spec).expanduser()
    found = None if generated else find_format(root, data_format)
    if split in UNLABELED and (generated or not READERS[found.format].unlabeled):
        raise DataError(f"{printable(spec)}: split {split!r} is STL-10's alone")
    if generated:
        return load_shapes(spec, split)
    content = READERS[found.format].read(found.place, split)
    if isinstance(content, Arrays):
        images, more = torch.from_numpy(content.images), {}
    else:
        images, more = _decoded(content, image_size, memory_limit, workers)
    statistics = content.statistics or known_statistics(root)
    mean, std = STATISTICS[statistics]
    return ImageSet(
        images=images,
        labels=None if content.labels is None else torch.as_tensor(content.labels),
        classes=content.classes if content.labels is not None else [],
        mean=mean,
        std=std,
        name=f"{printable(root)} ({split})",
        statistics=statistics,
        data_format=found.format,
        **more,
    )


def training_split(spec: str, data_format: str = "auto") -> str:
    """The split meant for training without labels: STL-10's has the unlabeled images too.

    Raises:
        DataError: as `load_dataset`.
    """
    if is_generated(spec) and data_format in ("auto", "shapes"):
        return "train"
    found = find_format(Path(spec).expanduser(), data_format)
    return UNLABELED[-1] if READERS[found.format].unlabeled else "train"


def known_statistics(root: Path) -> str:
    """The row of STATISTICS that a folder's name points to; "imagenet" if none does."""
    path = root.absolute()
    divided = path.name in (folder.TRAIN, *folder.TESTS)
    plain = re.sub(r"[^a-z0-9]", "", (path.parent if divided else path).name.lower())
    for row in ("cifar100", "cifar10", "stl10"):
        if row in plain:
            return row
    return "tiny-imagenet" if plain.startswith("tiny") else "imagenet"


# ------------------------------------------------------------------------------ sets of image files


def _decoded(
    listing: Listing, requested: int | None, memory_limit: int | None, workers: int | None
) -> tuple[torch.Tensor | decode.LazyImages, dict[str, Any]]:
    """A listing's images, decoded now where they fit in memory; and what else the set has.

    Those that are stored as centred squares keep their files at hand for crops of the whole.
    """
    decode.pillow()
    (height, width), whole = _probe(listing, requested)
    files = decode.LazyImages(
        listing, (height, width), _default_workers() if workers is None else workers
    )
    limit = _default_memory_limit() if memory_limit is None else memory_limit
    images = files.read_all() if len(files) * 3 * height * width <= limit else files
    more = dict(files=None if whole else files, skipped=files.skipped, notes=listing.notes)
    return images, more


def _probe(listing: Listing, requested: int | None) -> tuple[tuple[int, int], bool]:
    """(height, width) to store images in, and whether they are then whole.

    Small images of one size are kept; others become squares of `requested` pixels a side.
    """
    step = max(1, len(listing.files) // PROBES)
    sizes = set()
    for index in range(0, len(listing.files), step)[:PROBES]:
        try:
            sizes.add(decode.image_size(listing.open(index)))
        except Exception:
            continue
    if len(sizes) == 1:
        height, width = sizes.pop()
        if max(height, width) <= (requested or SMALL):
            return (height, width), True
    return (requested or DEFAULT_SIZE,) * 2, False


def _default_memory_limit() -> int:
    """A quarter of the machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, available or 1))

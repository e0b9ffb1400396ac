"""From a name or a path to an `ImageSet`, resident where it fits in memory."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch

from softcl.data import decode
from softcl.data.cache import Cache
from softcl.data.depth import White, scale_of
from softcl.data.formats import READERS, find_format, usable_path
from softcl.data.image_set import STATISTICS, ImageSet, Listing, printable
from softcl.data.kept import read_listing, read_pixels
from softcl.data.shapes import load_shapes
from softcl.data.splits import WORDS, choose, is_divided
from softcl.data.walk import counted
from softcl.errors import DataError

SMALL = 128  # images of one size up to this many pixels a side are kept as they are
DEFAULT_SIZE = 224
PROBES = 64  # files looked at to learn the images' size and depth
FEW_LEVELS = 32  # of 256: a range of values in which nothing can be seen
UNLABELED = ("unlabeled", "train+unlabeled")
SPLITS = ("train", "test", "all", *UNLABELED)


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
    whole: bool = False,
    cache: str | Path | None = None,
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
    whole         take all of an undivided set of image files for "test", where a tenth is held out
    cache         folder in which what was decoded is kept; default the user's; "off": none

    Raises DataError, one line that names the path, where the data cannot be read; ImportError,
    naming the extra, without pillow.
    """
    if split not in SPLITS:
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split must be one of {known}, got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    generated = is_generated(spec) and data_format in ("auto", "shapes")
    root = usable_path(spec)
    found = None if generated else find_format(root, data_format)
    if split in UNLABELED and (generated or not READERS[found.format].unlabeled):
        raise DataError(f"{printable(spec)}: split {split!r} is STL-10's alone")
    if generated:
        return load_shapes(spec, split)
    stored = READERS[found.format]
    kept = Cache(cache)
    if stored.lists:
        listing = read_listing(stored.read, found.place, kept)
        listing.read = stored.reader and stored.reader()
        known = listing.statistics
        if whole and split == "test" and not is_divided(listing.parts.values):
            split = "all"
        content = decoded(listing, split, image_size, memory_limit, workers, kept)
    else:
        pixels = stored.read(found.place, split)
        known = pixels.statistics
        content = {**pixels._asdict(), "images": torch.from_numpy(pixels.images)}
    content["statistics"] = known or known_statistics(root)
    content["mean"], content["std"] = STATISTICS[content["statistics"]]
    content["notes"] = [*found.notes, *content["notes"], *kept.notes]
    if content["labels"] is not None:
        content["labels"] = torch.as_tensor(content["labels"])
    name = f"{printable(spec)} ({split})"
    result = ImageSet(name=name, data_format=found.format, **content)
    result.notes += _few_levels(result)
    return result


def _few_levels(images: ImageSet) -> list[str]:
    """A note where all that some images have is nearly one value."""
    values = images.batch(torch.arange(0, len(images), -(-len(images) // PROBES)))
    low, high = int(values.min()), int(values.max())
    if high - low >= FEW_LEVELS:
        return []
    return [f"the pixels of {len(values)} images looked at are all between {low} and {high} of 255"]


def training_split(spec: str, data_format: str = "auto") -> str:
    """The split meant for training without labels: STL-10's has the unlabeled images too.

    Raises:
        DataError: as `load_dataset`.
    """
    if is_generated(spec) and data_format in ("auto", "shapes"):
        return "train"
    found = find_format(spec, data_format)
    return UNLABELED[-1] if READERS[found.format].unlabeled else "train"


def known_statistics(root: Path) -> str:
    """The row of STATISTICS that a folder's name points to; "imagenet" if none does."""
    path = root.absolute()
    divided = path.name.lower() in WORDS
    plain = re.sub(r"[^a-z0-9]", "", (path.parent if divided else path).name.lower())
    for row in ("cifar100", "cifar10", "stl10"):
        if row in plain:
            return row
    return "tiny-imagenet" if plain.startswith("tiny") else "imagenet"


# ------------------------------------------------------------------------------ sets of image files


def decoded(
    listing: Listing,
    split: str,
    requested: int | None,
    memory_limit: int | None,
    workers: int | None,
    cache: Cache,
) -> dict[str, Any]:
    """What an `ImageSet` has of a split: its images, decoded now where they fit in memory.

    Those that are stored as centred squares keep their files at hand for crops of the whole. Size
    and scale are the same for all splits.
    """
    decode.silence()
    size, whole, white, scale = _probe(listing, requested)
    chosen = choose(
        listing.root, split, listing.parts, listing.labels, listing.names, listing.why_unlabelled
    )
    notes = [*listing.notes, *chosen.notes, *listing.lost]
    if listing.left_out:
        notes.append(f"left out, as they are not read: {counted(listing.left_out)}")
    notes += scale
    listing = dataclasses.replace(listing.only(chosen.places), labels=chosen.labels)
    workers = _default_workers() if workers is None else workers
    files = decode.LazyImages(listing, size, workers, white)
    limit = _default_memory_limit() if memory_limit is None else memory_limit
    fits = len(files) * 3 * size[0] * size[1] <= limit
    return {
        "images": read_pixels(files, cache) if fits else files,
        "labels": files.listing.labels,
        "classes": chosen.classes,
        "notes": notes,
        "skipped": files.skipped,
        "files": None if whole else files,
        "listing": files.listing,
    }


def _probe(
    listing: Listing, requested: int | None
) -> tuple[tuple[int, int], bool, White, list[str]]:
    """(height, width) to store images in, and whether they are then whole; the scale of grey ones
    of more than 8 bits, and lines about it.

    Small images of one size are kept; others become squares of `requested` pixels a side.
    """
    step = max(1, len(listing.files) // PROBES)
    sizes, largest = set(), {}
    for index in range(0, len(listing.files), step)[:PROBES]:
        try:
            found = decode.probe(listing.open(index))
        except Exception:
            continue
        sizes.add((found.height, found.width))
        if found.largest is not None:
            known = largest.get(found.floating, 0.0)
            largest[found.floating] = max(known, found.largest)
    white, notes = scale_of(largest)
    if len(sizes) == 1:
        height, width = sizes.pop()
        if max(height, width) <= (requested or SMALL):
            return (height, width), True, white, notes
    return (requested or DEFAULT_SIZE,) * 2, False, white, notes


def _default_memory_limit() -> int:
    """A quarter of the machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, available or 1))

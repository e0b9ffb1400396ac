"""From a name or a path to an `ImageSet`, resident where it fits in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from softcl.data import cifar, decode, formats, stl10
from softcl.data.folder import TESTS, TRAIN
from softcl.data.formats import Found
from softcl.data.image_set import STATISTICS, DataError, ImageSet
from softcl.data.listing import Listing, printable
from softcl.data.on_demand import LazyImages, reason_of, refuse_if_many
from softcl.data.shapes import TEST_SIZE, TRAIN_SIZE, make_shapes

SMALL = 128  # images of one size up to this many pixels a side are kept as they are
DEFAULT_SIZE = 224
PROBES = 64  # files looked at to learn the images' size
CHUNK = 32  # files per task of the decoding pool
SPLITS = tuple(stl10.SPLITS)  # the last two are STL-10's alone


def _default_memory_limit() -> int:
    """A quarter of the machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, available or 1))


def _on_threads(workers: int, function: Callable[[int], None], values: Iterable[int]) -> None:
    """Call `function` for each of `values` on so many threads; without any, in this one."""
    if workers == 0:
        for value in values:
            function(value)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="softcl-decode") as pool:
        for _ in pool.map(function, values):
            pass


def _probe(listing: Listing, requested: int | None) -> tuple[tuple[int, int], bool]:
    """(height, width) to store images in, and whether they are then whole.

    Small images of one size are kept; others become squares of `requested` pixels a side.
    """
    step = max(1, len(listing.files) // PROBES)
    sizes = set()
    for index in range(0, len(listing.files), step)[:PROBES]:
        try:
            sizes.add(decode.image_size(listing.open(index)))
        except ImportError:
            raise
        except Exception:
            continue
    if len(sizes) == 1:
        height, width = sizes.pop()
        if max(height, width) <= (requested or SMALL):
            return (height, width), True
    return (requested or DEFAULT_SIZE,) * 2, False


def _read_all(
    listing: Listing, size: tuple[int, int], workers: int
) -> tuple[torch.Tensor, list[int], list[str]]:
    """All images, uint8 (M, 3, H, W); the positions that could be read; the others' reasons."""
    images = torch.empty((len(listing.files), 3, *size), dtype=torch.uint8)
    array = images.numpy()
    broken: dict[int, str] = {}

    def read(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(listing.files))):
            try:
                array[i] = decode.decode(listing.open(i), *size)
            except Exception as error:
                broken[i] = f"{printable(listing.files[i])}: {reason_of(error)}"

    _on_threads(workers, read, range(0, len(listing.files), CHUNK))
    unreadable = [broken[i] for i in sorted(broken)]
    refuse_if_many(listing.root, unreadable, len(listing.files))
    skipped = listing.skipped + unreadable
    kept = [i for i in range(len(listing.files)) if i not in broken]
    return (images[kept] if broken else images), kept, skipped


def known_statistics(root: Path) -> str:
    """The row of STATISTICS that a folder's name points to; "imagenet" if none does."""
    path = root.absolute()
    name = path.parent.name if path.name in (TRAIN, *TESTS) else path.name
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for row in ("cifar100", "cifar10", "stl10"):
        if row in plain:
            return row
    return "tiny" if plain.startswith("tiny") else "imagenet"


def _load_listing(
    listing: Listing,
    found: Found,
    split: str,
    requested: int | None,
    memory_limit: int | None,
    workers: int | None,
) -> ImageSet:
    """Decode a listing's images, now where they fit in memory, or else on demand.

    Those that are stored as centred squares keep their files at hand for crops of the whole.
    """
    decode.pillow()
    workers = _default_workers() if workers is None else workers
    size, whole = _probe(listing, requested)
    limit = _default_memory_limit() if memory_limit is None else memory_limit
    labels = listing.labels
    if len(listing.files) * 3 * size[0] * size[1] <= limit:
        images, kept, skipped = _read_all(listing, size, workers)
        if len(kept) < len(listing.files):
            listing.keep(kept)
            labels = listing.labels
        files = LazyImages(listing, size, workers, skipped)
    else:
        images = files = LazyImages(listing, size, workers)
        skipped = images.skipped
    return _image_set(
        images,
        torch.tensor(labels, dtype=torch.int64) if labels else None,
        listing.classes,
        found,
        split,
        skipped=skipped,
        notes=listing.notes,
        files=None if whole else files,
    )


def _image_set(
    images: torch.Tensor | LazyImages,
    labels: torch.Tensor | None,
    classes: list[str],
    found: Found,
    split: str,
    **rest: Any,
) -> ImageSet:
    """The set, normalised by what its format or else its folder's name says it is."""
    statistics = found.statistics or known_statistics(found.root)
    mean, std = STATISTICS[statistics]
    return ImageSet(
        images,
        labels,
        classes if labels is not None else [],
        mean,
        std,
        f"{printable(found.root)} ({split})",
        statistics,
        data_format=found.format,
        **rest,
    )


def _load_arrays(found: Found, split: str) -> ImageSet:
    """A set whose files hold raw pixels."""
    if found.format == "cifar":
        images, labels, classes = cifar.read(*found.place, split)
    else:
        images, labels, classes = stl10.read(found.place, split)
    tensor = None if labels is None else torch.from_numpy(labels)
    return _image_set(torch.from_numpy(images), tensor, classes, found, split)


def _load_shapes(spec: str, split: str) -> ImageSet:
    _, colon, count = spec.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise DataError(
            f"{spec}: write shapes or shapes:N with a positive number of training images"
        )
    train = int(count) if colon else TRAIN_SIZE
    if split == "all":
        parts = [make_shapes(train, "train"), make_shapes(TEST_SIZE, "test")]
        both = parts[0]
        both.images = torch.cat([p.images for p in parts])
        both.factors = {k: torch.cat([p.factors[k] for p in parts]) for k in both.factors}
        both.labels = both.factors["shape"]
        both.name = "shapes (all)"
        return both
    return make_shapes(train if split == "train" else TEST_SIZE, split)


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
                  a path ("./shapes" for a folder of that name), see softcl/data/formats.py
    split         "train", "test" or "all"; for STL-10 also "unlabeled" and "train+unlabeled"
    image_size    pixels a side to store image files in, unless they all have one size that is no
                  larger; default 224, where images of one size up to 128 pixels are kept. Others
                  are stored as centred squares, and `ImageSet.files` crops the whole images. Sets
                  of raw pixels keep their size.
    memory_limit  bytes of pixels above which images are decoded on demand; default a quarter of
                  the machine's memory
    workers       threads that decode; default the cores, at most 16; 0 for the caller's own alone
    data_format   a word of formats.FORMATS, or "auto"

    Raises DataError, one line that names the path, where the data cannot be read; ImportError,
    naming the extra, without pillow.
    """
    if split not in SPLITS:
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split must be one of {known}, got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    generated = is_generated(spec) and data_format in ("auto", "shapes")
    found = None if generated else formats.find(Path(spec).expanduser(), data_format)
    if split not in ("train", "test", "all") and (generated or found.format != "stl10"):
        raise DataError(f"{printable(spec)}: split {split!r} is STL-10's alone")
    if generated:
        return _load_shapes(spec, split)
    if found.format in ("cifar", "stl10"):
        return _load_arrays(found, split)
    listing = formats.LISTINGS[found.format](found.place, split)
    return _load_listing(listing, found, split, image_size, memory_limit, workers)


def is_generated(spec: str) -> bool:
    """Whether `spec` names the generated set."""
    return spec == "shapes" or spec.startswith("shapes:")


def training_split(spec: str, data_format: str = "auto") -> str:
    """The split meant for training without labels: STL-10's has the unlabeled images too.

    Raises:
        DataError: as `load_dataset`.
    """
    if is_generated(spec) and data_format in ("auto", "shapes"):
        return "train"
    found = formats.find(Path(spec).expanduser(), data_format)
    return stl10.PRETRAINING if found.format == "stl10" else "train"

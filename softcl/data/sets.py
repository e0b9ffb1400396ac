"""From a name or a path to an `ImageSet`, resident where it fits in memory."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softcl.data import arrays, decode, folder, packed
from softcl.data.cache import Cache
from softcl.data.depth import White, scale_of
from softcl.data.image_set import STATISTICS, Arrays, ImageSet, Listing, Reader, printable
from softcl.data.kept import read_listing, read_pixels
from softcl.data.shapes import load_shapes
from softcl.data.splits import WORDS, choose, is_divided
from softcl.data.walk import counted, described, is_ignored, suffix_of, walk
from softcl.errors import DataError

SMALL = 128  # images of one size up to this many pixels a side are kept as they are
DEFAULT_SIZE = 224
PROBES = 64  # files looked at to learn the images' size and depth
FEW_LEVELS = 32  # of 256: a range of values in which nothing can be seen
MOST_FILES = 100_000  # that a pattern may name
UNLABELED = ("unlabeled", "train+unlabeled")
SPLITS = ("train", "test", "all", *UNLABELED)
READ = (
    "folders of images, CIFAR, STL-10, MNIST's idx files, .npz and .npy arrays, "
    "plain .tar shards and .parquet files"
)


@dataclass(frozen=True)
class Format:
    """How the sets of one kind are stored.

    read:      from a path and a split `Arrays` of raw pixels; or, if it `lists`, from a path a
               `Listing` of the image files of all splits
    signs:     what a folder is recognised by: patterns of the names of files that lie in it; all
               of one group must be there
    suffixes:  of files that may be named themselves
    container: a folder is read with all that lies below it, and several files may be named by a
               pattern; else the folder that has the signs is read
    unlabeled: whether it has the splits of UNLABELED, the last of which is meant for training
    reader:    of images that lie in larger files: makes what reads one from there
    """

    read: Callable[[Any], Listing] | Callable[[Any, str], Arrays]
    signs: tuple[tuple[str, ...], ...]
    suffixes: tuple[str, ...] = ()
    container: bool = False
    unlabeled: bool = False
    lists: bool = False
    reader: Callable[[], Reader] | None = None


# In the order in which they are tried.
READERS: dict[str, Format] = {
    "cifar": Format(arrays.read_cifar, arrays.CIFAR_SIGNS),
    "stl10": Format(arrays.read_stl10, arrays.STL10_SIGNS, unlabeled=True),
    "idx": Format(arrays.read_idx, arrays.IDX_SIGNS),
    "tiny-imagenet": Format(folder.list_tiny_imagenet, folder.TINY_SIGNS, lists=True),
    "tar": Format(
        packed.list_tar,
        (("*.tar",),),
        (".tar",),
        container=True,
        lists=True,
        reader=packed.tar_reader,
    ),
    "parquet": Format(
        packed.list_parquet,
        (("*.parquet",),),
        (".parquet",),
        container=True,
        lists=True,
        reader=packed.parquet_reader,
    ),
    "numpy": Format(arrays.read_numpy, arrays.NUMPY_SIGNS, (".npz", ".npy")),
    "folder": Format(folder.list_folder, ((),), container=True, lists=True),
}
FORMATS = ("auto", "shapes", *READERS)
_PATTERNS = {one for stored in READERS.values() for group in stored.signs for one in group}
_SIGN = re.compile("|".join(map(fnmatch.translate, filter(glob.has_magic, sorted(_PATTERNS)))))


@dataclass(frozen=True)
class Found:
    """A recognised set: a key of READERS, what its reader takes, and notes about where it was."""

    format: str
    place: Path | list[Path]
    notes: tuple[str, ...] = ()


def find_format(spec: str | Path, wanted: str = "auto") -> Found:
    """Recognise what lies at a path, as the format `wanted` or as the first that fits.

    Signs are looked for in a folder and one level below it; deeper ones only of a format that is
    asked for, because a folder of a million images would have to be walked. Where a folder has
    nothing but one other folder, that is entered.

    Raises:
        DataError: there is no such path, or it is nothing of the wanted format.
    """
    if wanted not in FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(FORMATS)}, got {wanted!r}")
    root = _path(spec)
    if not root.exists():
        return _by_pattern(root, wanted)
    formats = {name: stored for name, stored in READERS.items() if wanted in ("auto", name)}
    if not root.is_dir():
        for name, stored in formats.items():
            if root.is_file() and suffix_of(root.name) in stored.suffixes:
                return Found(name, root)
        raise DataError(f"{printable(root)}: {_no_set(root)}")
    inner = root
    while True:
        signs = _signs_in(inner)
        for name, stored in formats.items():
            if name == "folder":
                continue
            place = _place(inner, stored, signs, deep=wanted == name)
            if place is not None:
                return Found(name, place)
        lone = _lone_folder(inner)
        if lone is None or len(inner.parts) > len(root.parts) + 100:
            break
        inner = lone
    if "folder" not in formats:
        raise DataError(f"{printable(root)}: nothing of format {wanted} here")
    entered = printable(inner.relative_to(root))
    notes = () if inner == root else (f"entered {entered}/: there is nothing beside it",)
    return Found("folder", inner, notes)


def _path(spec: str | Path) -> Path:
    try:
        path = Path(spec).expanduser()
        path.exists()
        return path
    except (RuntimeError, OSError) as error:  # no such user; too long for a name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(spec)}: {reason}") from error


def _no_set(file: Path) -> str:
    """Why a path that is no folder cannot be read, and what can."""
    known = described(file)
    if known is not None:
        return f"{known[0]}, which is not read: {known[1]}. Read are {READ}"
    if not file.is_file():
        return f"neither a folder nor a regular file. Read are {READ}"
    if suffix_of(file.name) in decode.suffixes():
        return f"not a folder but one image. Read are {READ}"
    return f"not a folder, and no file of a set. Read are {READ}"


def _signs_in(root: Path) -> dict[Path, list[str]]:
    """Of a folder and of the first ones in it the names that patterns of READERS fit.

    Found once for all patterns: a folder may hold a million names.
    """
    try:
        with os.scandir(root) as entries:
            below = [Path(e.path) for e in entries if e.is_dir() and not is_ignored(e.name)]
    except OSError:  # the reader of folders says what is wrong
        below = []
    found = {}
    for part in [root, *sorted(below)[:50]]:
        try:
            found[part] = [name for name in os.listdir(part) if _SIGN.match(name)]
        except OSError:
            found[part] = []
    return found


def _place(root: Path, stored: Format, signs: dict[Path, list[str]], deep: bool) -> Path | None:
    """What the format's reader takes of a folder, or None if it is nothing of it."""
    for part, names in signs.items():
        for group in stored.signs:
            fitting = [
                fnmatch.filter(names, pattern) if glob.has_magic(pattern) else [pattern]
                for pattern in group
            ]
            if all(any((part / name).is_file() for name in some) for some in fitting):
                return root if stored.container else part
    if deep and stored.container:
        return root if any(True for _ in walk(root, stored.suffixes, Counter())) else None
    return None


def _lone_folder(root: Path) -> Path | None:
    """The only entry of a folder, if it is another folder and no part of a set."""
    try:
        with os.scandir(root) as entries:
            seen = (entry for entry in entries if not is_ignored(entry.name))
            first, second = next(seen, None), next(seen, None)
            alone = first is not None and second is None
            if alone and first.is_dir() and first.name.lower() not in WORDS:
                return root / first.name
    except OSError:
        pass
    return None


# ---------------------------------------------------------------------------------------- patterns


def _by_pattern(spec: Path, wanted: str) -> Found:
    """The files that a pattern names, as users of webdataset write them: shard-{000..003}.tar, *.

    Raises:
        DataError: one of them is not there, or they are of no format that has patterns.
    """
    text = str(spec)
    if not re.search(r"[*?\[{]", text):
        raise DataError(f"{printable(spec)}: no such file or folder")
    files: list[Path] = []
    for one in itertools.islice(_expanded(text), MOST_FILES):
        matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        if not matches or not os.path.isfile(matches[0]):
            raise DataError(f"{printable(spec)}: no such file: {printable(one)}")
        files += map(Path, matches)
    suffixes = {suffix_of(file.name) for file in files}
    for name, stored in READERS.items():
        if stored.container and wanted in ("auto", name) and suffixes <= {*stored.suffixes}:
            return Found(name, files)
    kinds = ", ".join(sorted(suffixes))
    raise DataError(f"{printable(spec)}: patterns name .tar or .parquet files, not {kinds}")


def _expanded(text: str) -> Iterator[str]:
    """a{1..3} as a1, a2, a3, zeros in front kept; a{x,y} as ax, ay."""
    match = re.search(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}", text)
    if match is None:
        yield text
        return
    first, last, words = match.groups()
    if words is None:
        inner = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    else:
        inner = words.split(",")
    for word in inner:
        yield from _expanded(text[: match.start()] + word + text[match.end() :])


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
    root = _path(spec)
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

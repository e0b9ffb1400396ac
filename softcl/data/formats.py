"""How the sets of each kind are stored, and which kind lies at a path."""

from __future__ import annotations

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

from softcl.data import arrays, decode, folder, packed
from softcl.data.image_set import Arrays, Listing, Reader, printable
from softcl.data.splits import WORDS
from softcl.data.walk import described, is_ignored, suffix_of, walk
from softcl.errors import DataError

MOST_FILES = 100_000  # that a pattern may name
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
    root = usable_path(spec)
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


def usable_path(spec: str | Path) -> Path:
    """The path that a user wrote, which may be nothing's.

    Raises:
        DataError: it cannot be that of anything.
    """
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

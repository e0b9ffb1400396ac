"""The files of a folder: which names are nobody's data, what is left out, how far reading is."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from softcl.data.image_set import Stamp, printable
from softcl.errors import DataError

FIRST_SECONDS, MORE_SECONDS = 3.0, 10.0  # until the first line about a slow set, and the next ones

GONE, NEVER = (-1, -1, -1), (-2, -2, -2)  # in place of a stamp; the latter equals none

# What systems and tools leave beside data, in lower case; names that start with a dot are too.
_IGNORED = frozenset(
    (
        "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
        "system volume information", "__pycache__", "thumbs.db", "desktop.ini",
    )
)  # fmt: skip

# What people name or have in a folder, and what to do about it. By suffix, and by first bytes.
_UNPACK = "unpack it, and name the folder"
_EXTRACT = "write its images as files, or as an .npz of uint8 arrays"
KINDS = {
    ".gz": ("a gzip file", _UNPACK),
    ".tgz": ("a compressed tar file", _UNPACK),
    ".bz2": ("a bzip2 file", _UNPACK),
    ".xz": ("an xz file", _UNPACK),
    ".zst": ("a zstd file", _UNPACK),
    ".zip": ("a zip archive", _UNPACK),
    ".7z": ("a 7-zip archive", _UNPACK),
    ".rar": ("a rar archive", _UNPACK),
    ".h5": ("an HDF5 file", _EXTRACT),
    ".hdf5": ("an HDF5 file", _EXTRACT),
    ".mat": ("a MATLAB file", _EXTRACT),
    ".mdb": ("an LMDB database", _EXTRACT),
    ".lmdb": ("an LMDB database", _EXTRACT),
    ".tfrecord": ("a TFRecord file", _EXTRACT),
    ".dcm": ("a DICOM file", _EXTRACT),
    ".arrow": ("an Arrow file", "save it as parquet: Dataset.to_parquet"),
    ".csv": ("a csv table", "name the folder of its images"),
    ".pkl": ("a pickle", _EXTRACT),
    ".pt": ("a file of torch", _EXTRACT),
    ".heic": ("a HEIC image", "convert it to JPEG"),
    ".svg": ("an SVG drawing", "convert it to PNG"),
}
_FIRST_BYTES = {
    b"\x1f\x8b": ".gz",
    b"PK\x03\x04": ".zip",
    b"\x89HDF": ".h5",
    b"ARROW1": ".arrow",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
}


def is_ignored(name: str) -> bool:
    """Whether a name is that of a hidden file, or of what systems leave beside people's files."""
    return name.startswith(".") or name.lower() in _IGNORED


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def stamp(path: str | Path) -> Stamp:
    """Size, time of change and time of the status of a file or a folder; GONE if it is not there.

    A program can set the time of change back, as unpackers do, but not the other one.
    """
    try:
        status = os.stat(path)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def walk(
    root: Path,
    suffixes: Collection[str],
    left_out: Counter[str],
    names: Collection[str] = (),
    sources: dict[str, Stamp] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Paths of the files below a folder as tuples of names, in sorted order; links are followed.

    Args:
        suffixes, names: what is wanted, in lower case.
        left_out: other files are counted in it, by their suffix or by what they are.
        sources: gets the stamp of each folder; of `root` NEVER where links to files say nothing
            about changes of what they lead to.

    Raises:
        DataError: a folder cannot be read.
    """
    sources = {} if sources is None else sources
    start = os.fspath(root)
    progress, count = Progress(f"listing {printable(root)}"), 0
    # Of each open folder: its path, its names, those of the folders above it, what is left of it.
    Open = tuple[str, tuple[str, ...], tuple, Iterator[tuple[str, bool]]]

    def opened(folder: str, prefix: tuple[str, ...], above: tuple) -> list[Open]:
        sources[folder] = stamp(folder)
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder that contains it
            return []
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                kind = _kind(entry)
                if entry.is_symlink() and kind != "folder":
                    sources[start] = NEVER
                if kind == "folder":
                    found.append((entry.name, True))
                elif kind != "file":
                    left_out[kind] += 1
                elif suffix_of(entry.name) in suffixes or entry.name in names:
                    found.append((entry.name, False))
                else:
                    left_out[suffix_of(entry.name) or "without a suffix"] += 1
        return [(folder, prefix, (*above, here), iter(sorted(found)))]

    try:
        waiting = opened(start, (), ())
        while waiting:
            folder, prefix, above, rest = waiting[-1]
            for name, is_folder in rest:
                if is_folder:
                    waiting += opened(os.path.join(folder, name), (*prefix, name), above)
                    break
                count += 1
                yield (*prefix, name)
            else:
                waiting.pop()
            progress.tick(count)
    except OSError as error:
        place = printable(error.filename or root)
        raise DataError(f"{place}: {error.strerror or error}") from error


def _kind(entry: os.DirEntry) -> str:
    """ "folder", "file", or the reason why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link that leads only to itself
        pass
    return "dangling link" if entry.is_symlink() else "no regular file"


def counted(what: Counter[str]) -> str:
    """ "5 .svg, 1 .csv": the most frequent first, six kinds at most."""
    words = [f"{number} {printable(kind)}" for kind, number in what.most_common(6)]
    return ", ".join(words + ["..."] * (len(what) > 6))


def described(path: Path) -> tuple[str, str] | None:
    """What a file is that is not read, and what to do about it; None if it is not known."""
    if not path.is_file():
        return None
    suffix = suffix_of(path.name)
    if suffix in KINDS:
        return KINDS[suffix]
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError:
        return None
    if start[128:] == b"DICM":
        return KINDS[".dcm"]
    return next(
        (KINDS[kind] for sign, kind in _FIRST_BYTES.items() if start.startswith(sign)), None
    )


class Progress:
    """Lines on standard error while a set is read that takes longer than three seconds.

    Args:
        what: is done, in a few words.
        total: how many there are, where that is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        # Every process reads the images; the first one tells.
        quiet = os.environ.get("RANK", "0") != "0"
        self._next = float("inf") if quiet else time.monotonic() + FIRST_SECONDS

    def tick(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + MORE_SECONDS
            of = "" if self.total is None else f" of {self.total}"
            print(f"{self.what}: {done}{of}", file=sys.stderr, flush=True)

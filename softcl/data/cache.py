"""What was read of image files, kept for the next start; `kept` says what.

An entry is one file: numbers of fixed size, a header in JSON, then arrays, which processes map into
memory and share. It has the sizes and times of the files that it was made of, and holds only while
they have the same; it is not made of files that changed while they were read. It is written under
another name and renamed, has a checksum over all of it, and is made anew where anything is wrong
with it. Whatever the disk does costs a line in `Cache.notes`, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softcl.data.image_set import printable
from softcl.data.walk import Progress, stamp
from softcl.files import cache_folder, open_file, replace_file

LIMIT = 32 * 2**30  # bytes of all entries; those that were not used for longest go first
SETTLED = 2.0  # seconds since a file's last change, less than which a disk's clock may not show
PATIENCE = 3600.0  # seconds that another process may take to make an entry
_DAY = 86400.0
_START = struct.Struct("<16sQQ")  # what it is, the checksum of the rest, the header's length
_SIGN = b"softcl cache 1\r\n"
_ALIGN = 64
_NAME = re.compile(r"(pixels|index)-[0-9a-f]{32}(\.lock)?|\.(pixels|index)-.*\.tmp")


class Entry(NamedTuple):
    """What is kept.

    meta:   numbers and words
    arrays: by name
    stamps: (n, 3) int64 of the files that it is made of, from before they were read; None where
            it is good for this time alone
    """

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    stamps: np.ndarray | None


def stamps(paths: Iterable[str]) -> np.ndarray:
    """`walk.stamp` of each file, (n, 3) int64."""
    return np.array([stamp(path) for path in paths], np.int64).reshape(-1, 3)


class Cache:
    """A folder of entries.

    Args:
        place: the folder; "off" for none; None for what ``SOFTCL_CACHE`` in the environment says
            instead, or softcl's in the user's cache folder.

    Attributes:
        notes: a line about whatever could not be read or kept.
    """

    def __init__(self, place: str | Path | None = None) -> None:
        self.notes: list[str] = []
        self.folder: Path | None = None
        place = place or os.environ.get("SOFTCL_CACHE")
        if place == "off":
            return
        try:
            self.folder = Path(place).expanduser() if place else cache_folder() / "images"
        except RuntimeError as error:  # no home
            self._note("nothing is kept", error)

    def _note(self, what: str, error: Exception) -> None:
        where = "" if self.folder is None else f"{printable(self.folder)}: "
        line = f"cache: {where}{what}: {getattr(error, 'strerror', None) or error}"
        if line not in self.notes:
            self.notes.append(line)

    def get(
        self,
        kind: str,
        key: Any,
        make: Callable[[], Entry],
        sources: Callable[[dict[str, Any]], Iterable[str]],
    ) -> Entry:
        """The entry that is kept under a key, or the one that is made now, and kept.

        Of processes that want the same one, the first makes it.

        Args:
            kind: a word of what it is, which its name begins with.
            key: all that it depends on besides its files; JSON.
            make: the entry; its errors are raised.
            sources: from its `meta` to the paths of the files that it depends on.
        """
        if self.folder is None:
            return make()
        text = json.dumps(key, sort_keys=True)
        file = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        found = self._read(file, text, sources)
        if found is not None:
            return found
        with self._locked(file, kind) as locked:
            found = self._read(file, text, sources) if locked else None
            if found is not None:
                return found
            made = make()
            if not locked or not self._write(file, text, made, sources):
                return made
        return self._read(file, text, sources) or made

    # ------------------------------------------------------------------------------------ reading

    def _read(self, file: Path, key: str, sources: Callable) -> Entry | None:
        """An entry that is undamaged and holds, or None."""
        try:
            with open_file(file) as stream:  # shared until somebody writes into it
                content = np.memmap(stream, np.uint8, "c")
            entry = _parse(content, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
            self._note(f"{file.name} is made anew", error)
            return None
        with contextlib.suppress(OSError):  # of another user's it cannot be noted that it is used
            os.utime(file)
        return entry if np.array_equal(stamps(sources(entry.meta)), entry.stamps) else None

    # ------------------------------------------------------------------------------------ writing

    @contextlib.contextmanager
    def _locked(self, file: Path, kind: str) -> Iterator[bool]:
        """Whether the entry may be written, which one process at a time does."""
        from filelock import FileLock, Timeout  # comes with torch

        lock = FileLock(f"{file}.lock")
        waiting = Progress(f"waiting for another process that makes these {kind}: second")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            while not lock.is_locked and time.monotonic() - start < PATIENCE:
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=min(PATIENCE, 1.0))
                waiting.tick(int(time.monotonic() - start))
        except (OSError, NotImplementedError) as error:
            self._note("nothing is kept", error)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _write(self, file: Path, key: str, entry: Entry, sources: Callable) -> bool:
        if entry.stamps is None:
            return False
        now = stamps(sources(entry.meta))
        age = time.time() - now[:, 1:].max(initial=0) / 1e9
        if not np.array_equal(now, entry.stamps) or abs(age) < SETTLED:
            return False  # they change: the next start reads them again
        parts = _parts(key, entry)
        size = sum(len(part) for part in parts)
        try:
            self._make_room(size, file)
            replace_file(file, parts)
            return True
        except OSError as error:
            self._note("nothing is kept", error)
            return False

    def _make_room(self, size: int, new: Path) -> None:
        """Remove what was not used for longest, until `size` bytes more are within the limit.

        Raises:
            OSError: they would not be, or fill the disk.
        """
        if size > LIMIT:
            raise OSError(0, f"{size / 1e9:.1f} GB are more than its limit of {LIMIT / 1e9:.1f}")
        entries = []
        for found in os.scandir(self.folder):
            if _NAME.fullmatch(found.name):
                with contextlib.suppress(OSError):  # another process removed it
                    status = found.stat()
                    entries.append((status.st_mtime, status.st_size, found.path))
        total = sum(length for _, length, path in entries)
        for used, length, path in sorted(entries):
            # What was killed while writing leaves its file, and each lock an empty one.
            remains = not path.endswith((".lock", ".tmp")) or time.time() - used < _DAY
            if (remains and total + size <= LIMIT) or path == f"{new}.lock":
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= length
        if 2 * size > shutil.disk_usage(self.folder).free:
            raise OSError(0, f"{size / 1e9:.1f} GB are more than half of what the disk has free")


def _parts(key: str, entry: Entry) -> list[memoryview | bytes]:
    """The bytes of an entry's file, one after the other."""
    arrays = {**entry.arrays, "stamps": entry.stamps}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = {name: [array.dtype.str, *array.shape] for name, array in arrays.items()}
    header = json.dumps({"key": key, "meta": entry.meta, "arrays": shapes}).encode()
    parts: list[memoryview | bytes] = [header + b" " * (-(_START.size + len(header)) % _ALIGN)]
    length = len(parts[0])
    for array in arrays.values():
        parts += [array.reshape(-1).view(np.uint8).data, bytes(-array.nbytes % _ALIGN)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [_START.pack(_SIGN, checksum, length), *parts]


def _parse(content: np.ndarray, key: str) -> Entry:
    """The entry in the bytes of a file.

    Raises:
        ValueError, TypeError, KeyError, RecursionError, struct.error: they are not those of one.
    """
    sign, checksum, length = _START.unpack_from(content)
    if sign != _SIGN:
        raise ValueError("it is nothing of this version of softcl")
    if zlib.crc32(content[_START.size :]) != checksum:
        raise ValueError("it is damaged (its checksum)")
    start = _START.size + length
    header = json.loads(content[_START.size : start].tobytes())
    if header["key"] != key:
        raise ValueError("it is of something else")
    arrays = {}
    for name, (kind, *shape) in header["arrays"].items():
        dtype = np.dtype(kind)
        stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[name] = content[start:stop].view(np.ndarray).view(dtype).reshape(shape)
        start = stop + -stop % _ALIGN
    return Entry(header["meta"], arrays, arrays.pop("stamps"))

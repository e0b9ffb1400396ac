"""What is kept of a set of image files: the list of them, and their pixels where they fit."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from softcl import __version__
from softcl.data import columns, decode, depth, folder, packed, walk
from softcl.data.cache import Cache, Entry, stamps
from softcl.data.columns import Names, Words
from softcl.data.image_set import Listing

# Of a listing, as they are.
_WORDS = ("names", "notes", "lost", "unit", "statistics", "why_unlabelled")


def read_listing(
    read: Callable[[Any], Listing], place: Path | Sequence[Path], cache: Cache
) -> Listing:
    """What `read` lists at a place, mapped from the disk where it is kept.

    It holds while the folders, the tables and the files with images in them have their sizes and
    times; of a folder of images the images themselves are not looked at.
    """
    paths = [place] if isinstance(place, Path) else place
    key = {
        "read": read.__name__,
        "place": [(os.fspath(path), os.path.abspath(path)) for path in paths],
        "suffixes": sorted(decode.suffixes()),
        "code": _code(sys.modules[read.__module__], columns, folder, packed, walk),
    }
    entry = cache.get("index", key, lambda: _entry(read(place)), lambda meta: meta["sources"])
    return _listing(entry)


def _entry(listing: Listing) -> Entry:
    meta = {name: getattr(listing, name) for name in _WORDS} | {
        "root": os.fspath(listing.root),
        "left_out": dict(listing.left_out),
        "containers": [os.fspath(path) for path in listing.containers],
        "sources": list(listing.sources),
        "parts": listing.parts.values,
        "labels": listing.labels.values,
    }
    arrays = {
        "text": listing.files.text,
        "starts": listing.files.starts,
        "lengths": listing.files.lengths,
        "parts": listing.parts.codes,
        "labels": listing.labels.codes,
    }
    if listing.places is not None:
        arrays["places"] = listing.places
    sources = list(listing.sources.values())
    return Entry(meta, arrays, np.array(sources, np.int64) if sources else None)


def _listing(entry: Entry) -> Listing:
    meta, arrays = entry.meta, entry.arrays
    return Listing(
        root=Path(meta["root"]),
        files=Names(arrays["text"], arrays["starts"], arrays["lengths"]),
        parts=Words(meta["parts"], arrays["parts"]),
        labels=Words(meta["labels"], arrays["labels"]),
        left_out=Counter(meta["left_out"]),
        containers=[Path(path) for path in meta["containers"]],
        places=arrays.get("places"),
        **{name: meta[name] for name in _WORDS},
    )


def read_pixels(files: decode.LazyImages, cache: Cache) -> torch.Tensor:
    """All images that can be read, uint8 (M, 3, H, W), decoded once; the others leave the listing.

    The tensor may be mapped from the disk: what is written into it stays this process's own.
    """
    listing = files.listing
    paths = listing.paths()
    names = "\n".join(listing.files).encode("utf-8", "surrogateescape")
    key = {
        "root": os.path.abspath(listing.root),
        "files": hashlib.sha256(names).hexdigest(),
        "size": files.size,
        "white": files.white,
        "decoder": _decoder(),
    }

    def make() -> Entry:
        before = stamps(paths)
        images, kept = files.read_all()
        found = {"images": images.numpy(), "kept": kept}
        return Entry({"skipped": files.skipped}, found, None if files.may_pass else before)

    entry = cache.get("pixels", key, make, lambda meta: paths)
    files.skipped[:] = entry.meta["skipped"]
    files.keep(entry.arrays["kept"])
    return torch.from_numpy(entry.arrays["images"])


def _decoder() -> list[str]:
    """What decides about the pixels of a file: our code, and the libraries below it."""
    from PIL import __version__, features

    libraries = [f"{name} {features.version(name)}" for name in features.get_supported()]
    return [_code(decode, depth, packed), f"Pillow {__version__}", *libraries]


def _code(*modules: ModuleType) -> str:
    """Changes with the version, and where the sources are at hand with them."""
    digest = hashlib.sha256(__version__.encode())
    for module in modules:
        try:
            digest.update(inspect.getsource(module).encode())
        except OSError:
            break
    return digest.hexdigest()

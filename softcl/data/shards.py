"""WebDataset shards: tar files in which the members of one sample share a name up to its first dot.

    0001.jpg 0001.cls      an image and its class, a whole number in text
    0002.jpg 0002.json     the class may stand in a JSON object too, as "label", "cls" or "class"

The shards are indexed once, by their headers; images are then read from where they lie. So a shard
must be an uncompressed tar file. A shard that is cut short gives the images before the cut.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from softcl.data.folder import EXTENSIONS
from softcl.data.image_set import DataError
from softcl.data.listing import Listing, PackedListing, printable
from softcl.data.splits import by_name

_END_BYTES = 1024  # two blocks of zeros
_LABEL_KEYS = ("label", "cls", "class")


class ShardListing(PackedListing):
    """Images inside tar files; a place is (shard, offset, length)."""

    def open(self, index: int) -> BinaryIO:
        shard, offset, length = self.places[index]
        with open(self.containers[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))


def find(root: Path) -> list[Path]:
    """The tar files that `root` is or holds, sorted."""
    if root.is_file():
        return [root] if root.suffix == ".tar" else []
    return sorted(path for path in root.rglob("*.tar") if path.is_file())


def list_images(root: Path, split: str) -> ShardListing:
    """The images of split "train", "test" or "all"; shards belong to one by their names.

    Raises:
        DataError: a shard is compressed or no tar file, or the split has no images.
    """
    base = root.parent if root.is_file() else root
    shards, divided = by_name(base, find(root), split)
    listing = ShardListing(base, [], None, [], containers=shards)
    labels: list[int | None] = []
    for number, shard in enumerate(shards):
        for name, place, label in _samples(shard, listing):
            listing.files.append(f"{printable(shard.name)}/{name}")
            listing.places.append((number, *place))
            labels.append(label)
    if not listing.files:
        raise DataError(f"{printable(root)}: no images in its {len(shards)} tar file(s)")
    listing.set_labels(labels)
    if not divided:
        listing.hold_out(split, "tar file")
    return listing


def _samples(shard: Path, listing: Listing) -> list[tuple[str, tuple[int, int], int | None]]:
    """(name, (offset, length), label) of each image of a shard, in its order."""
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    size, end = os.path.getsize(shard), 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                end = member.offset_data + member.size
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if end > size:
                    raise tarfile.ReadError("a member is cut short")
                if "." + extension.rpartition(".")[2] in EXTENSIONS and key not in images:
                    images[key] = (printable(member.name), (member.offset_data, member.size))
                elif extension in (".cls", ".json"):
                    label = _label(archive.extractfile(member).read(), extension)
                    if label is not None:
                        labels[key] = label
        if end + _END_BYTES > size:  # where a whole one has its end mark
            raise tarfile.ReadError("no end mark")
    except tarfile.ReadError as error:
        if not images:
            reason = "compressed or damaged; shards must be plain tar files"
            raise DataError(f"{printable(shard)}: not a readable tar file ({reason})") from error
        last = next(reversed(images))
        if labels and last not in labels:  # it was in what is missing
            del images[last]
        listing.skipped.append(f"{printable(shard.name)}: cut short after {len(images)} images")
    return [(name, place, labels.get(key)) for key, (name, place) in images.items()]


def _label(data: bytes, extension: str) -> int | None:
    try:
        if extension == ".cls":
            label = int(data)
        else:
            content = json.loads(data)
            label = next(content[key] for key in _LABEL_KEYS if key in content)
    except (ValueError, TypeError, StopIteration):
        return None
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return label if is_number and 0 <= label < 1 << 31 else None

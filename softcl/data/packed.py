"""Image files packed in larger ones: WebDataset shards (tar) and parquet files.

They are indexed once, and images are then read from where they lie, in any order: the readers of
webdataset and Hugging Face's datasets give streams, whose order depends on the workers.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from softcl.data.folder import EXTENSIONS
from softcl.data.image_set import DataError, Listing, printable

_TRAIN = re.compile(r"(^|[^a-z])(train|training)([^a-z]|$)")
_TEST = re.compile(r"(^|[^a-z])(test|val|valid|validation)([^a-z]|$)")


def _containers(root: Path, kind: str, split: str) -> tuple[Path, list[Path], bool]:
    """The folder, its containers of a split, and whether their names divide the set at all.

    The words train, test and val in a path below the folder do. If none has any, the containers
    are all of them.
    """
    base = root.parent if root.is_file() else root
    files = [root] if root.is_file() else sorted(p for p in root.rglob(f"*.{kind}") if p.is_file())
    names = [path.relative_to(base).as_posix().lower() for path in files]
    train = [path for path, name in zip(files, names, strict=True) if _TRAIN.search(name)]
    tests = [path for path, name in zip(files, names, strict=True) if _TEST.search(name)]
    if not train and not tests:
        return base, files, False
    chosen = {"train": train, "test": tests, "all": files}[split]
    if not chosen:
        raise DataError(f"{base}: no file with {split!r} in its name among {len(files)}")
    return base, chosen, True


def _set_labels(listing: Listing, labels: Sequence[int | None], names: Sequence[str] = ()) -> None:
    """Take the labels if every image has one; classes without a name are called by number."""
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        missing = len(labels) - len(known)
        listing.notes.append(f"{missing} of {len(labels)} images have no label: no labels")
    elif known:
        listing.labels = known
        listing.classes = [*names, *map(str, range(len(names), max(known) + 1))]


# --------------------------------------------------------------------------------------- tar shards

_END_BYTES = 1024  # two blocks of zeros
_LABEL_KEYS = ("label", "cls", "class")


def list_tar(root: Path, split: str) -> Listing:
    """The images of split "train", "test" or "all" in shards that belong to one by their names.

        0001.jpg 0001.cls      an image and its class, a whole number in text
        0002.jpg 0002.json     the class may stand in a JSON object too, as "label", "cls", "class"

    The members of a sample share a name up to its first dot. A shard must be an uncompressed tar
    file; one that is cut short gives the images before the cut.

    Raises:
        DataError: a shard is compressed or no tar file, or the split has no images.
    """
    base, shards, divided = _containers(root, "tar", split)
    listing = Listing(base, [], None, [], places=[], read=_read_member)
    labels: list[int | None] = []
    for shard in shards:
        for name, place, label in _samples(shard, listing):
            listing.files.append(f"{printable(shard.name)}/{name}")
            listing.places.append((shard, *place))
            labels.append(label)
    if not listing.files:
        raise DataError(f"{printable(root)}: no images in its {len(shards)} tar file(s)")
    _set_labels(listing, labels)
    if not divided:
        listing.hold_out(split, "no tar file has test or val in its name")
    return listing


def _read_member(place: tuple[Path, int, int]) -> BinaryIO:
    shard, offset, length = place
    with open(shard, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


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


# ----------------------------------------------------------------------------------------- parquet

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
_GROUPS_HELD = 8


def list_parquet(root: Path, split: str) -> Listing:
    """The images of split "train", "test" or "all" in files that belong to one by their names.

    As Hugging Face datasets store them: one column holds the bytes of image files, bare or as a
    struct with a field "bytes", another whole numbers, the labels. Needs pyarrow, which softcl does
    not install by itself.

    Images are read by row groups, of which the last few stay in memory: a set that fits is read
    once from front to back; one that does not is read a whole group for each image, so many small
    groups are faster than few large ones.

    Raises:
        DataError: pyarrow is absent, a file is damaged or has no column of images.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError("reading parquet files needs pyarrow: pip install pyarrow") from error
    lock = threading.Lock()

    @functools.lru_cache(_GROUPS_HELD)
    def group_of(table: Path, group: int, column: str) -> Any:
        return parquet.ParquetFile(table).read_row_group(group, columns=[column]).column(column)

    def read(place: tuple[Path, int, str, int]) -> BinaryIO:
        *group, row = place
        with lock:
            value = group_of(*group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("no bytes in this row")
        return io.BytesIO(data)

    base, tables, divided = _containers(root, "parquet", split)
    listing = Listing(base, [], None, [], places=[], read=read)
    labels: list[int | None] = []
    names: list[str] = []
    for table in tables:
        try:
            file = parquet.ParquetFile(table)
            column = _image_column(table, file.schema_arrow)
            groups = [
                file.metadata.row_group(group).num_rows
                for group in range(file.metadata.num_row_groups)
            ]
            found, named = _parquet_labels(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
            reason = " ".join(str(error).split())
            raise DataError(f"{printable(table)}: cannot read: {reason}") from error
        rows = [(group, row) for group, count in enumerate(groups) for row in range(count)]
        listing.files += [f"{printable(table.name)}, row {place}" for place in range(len(rows))]
        listing.places += [(table, group, column, row) for group, row in rows]
        labels += found
        names = names or named
    if not listing.files:
        raise DataError(f"{printable(root)}: its parquet files have no rows")
    _set_labels(listing, labels, names)
    if not divided:
        listing.hold_out(split, "no parquet file has test or val in its name")
    return listing


def _parquet_labels(file: Any) -> tuple[list[int | None], list[str]]:
    """A file's labels, and the names of the classes where Hugging Face datasets left any."""
    schema = file.schema_arrow
    column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if column is None:
        return [None] * file.metadata.num_rows, []
    values = file.read(columns=[column]).column(column).to_pylist()
    labels = [v if isinstance(v, int) and v >= 0 else None for v in values]
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        names = content["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return labels, []
    return labels, [str(name) for name in names] if isinstance(names, list) else []


def _image_column(table: Path, schema: Any) -> str:
    """The column of images: one of the usual names, or the only one that holds bytes."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            names = [kind.field(place).name for place in range(kind.num_fields)]
            return "bytes" in names
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    able = [column.name for column in schema if holds_bytes(column.type)]
    named = [name for name in IMAGE_COLUMNS if name in able]
    if named or len(able) == 1:
        return (named or able)[0]
    raise DataError(
        f"{printable(table)}: no column of images among {', '.join(schema.names)} "
        f"(looked for bytes in {', '.join(IMAGE_COLUMNS)})"
    )

"""Image files packed in larger ones: WebDataset shards (tar) and parquet files.

They are indexed once, and images are then read from where they lie, in any order: the readers of
webdataset and Hugging Face's datasets give streams, whose order depends on the workers.
"""

from __future__ import annotations

import array
import functools
import io
import json
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from softcl.data.columns import Names, Words
from softcl.data.decode import suffixes
from softcl.data.folder import LABEL_KEYS
from softcl.data.image_set import Listing, Reader, Stamp, printable
from softcl.data.splits import Label, as_label, part_in
from softcl.data.stream import LANES
from softcl.data.walk import Progress, is_ignored, stamp, suffix_of, walk
from softcl.errors import DataError

Place = Path | Sequence[Path]  # a file or a folder; or the files that a pattern names


def _containers(place: Place, kind: str, unit: int) -> Listing:
    """A listing of the files of one kind that are read, and of no images yet."""
    left_out: Counter[str] = Counter()
    sources: dict[str, Stamp] = {}
    if not isinstance(place, Path):
        base, files = Path(os.path.commonpath([file.parent for file in place])), list(place)
    elif place.is_file():
        base, files = place.parent, [place]
    else:
        paths = walk(place, (kind,), left_out, sources=sources)
        base, files = place, [place.joinpath(*names) for names in paths]
    sources |= {os.fspath(file): stamp(file) for file in files}
    none = Words.of(())
    return Listing(
        base,
        Names.of(()),
        none,
        none,
        left_out=left_out,
        containers=files,
        unit=unit,
        sources=sources,
    )


class _Images(NamedTuple):
    """The images of one container: name, label, and the two numbers that say where it lies."""

    names: list[str]
    labels: list[Label]
    places: list[tuple[int, int]]


def _fill(listing: Listing, images: Iterable[_Images], what: str) -> None:
    """Complete a listing with the images of each of its containers, in their order."""
    progress = Progress(f"listing the {what} of {printable(listing.root)}: images")
    known_parts: dict[str, int] = {}
    known_labels: dict[Label, int] = {}
    parts, labels, places = array.array("i"), array.array("i"), array.array("q")

    def names() -> Iterator[str]:
        for number, (container, found) in enumerate(zip(listing.containers, images, strict=True)):
            part = part_in(container.relative_to(listing.root).as_posix())
            code = known_parts.setdefault(part, len(known_parts))
            for name, label, place in zip(*found, strict=True):
                parts.append(code)
                labels.append(known_labels.setdefault(label, len(known_labels)))
                places.extend((number, *place))
                yield f"{printable(container.name)}{name}"
            progress.tick(len(parts))

    listing.files = Names.of(names())
    listing.parts = Words(list(known_parts), np.array(parts, np.int32))
    listing.labels = Words(list(known_labels), np.array(labels, np.int32))
    listing.places = np.array(places, np.int64).reshape(-1, 3)


# --------------------------------------------------------------------------------------- tar shards

_END_BYTES = 1024  # two blocks of zeros
_LABEL_BYTES = 1 << 20  # that a file beside an image may have


def list_tar(place: Place) -> Listing:
    """The images of tar shards, which belong to a split by the shards' names.

        0001.jpg 0001.cls      an image and its class, a whole number or a word in text
        0002.jpg 0002.json     the class may stand in a JSON object too, as one of LABEL_KEYS

    The members of a sample share a name up to its first dot. A shard must be an uncompressed tar
    file; one that is cut short gives the images before the cut, and counts for as many lost ones as
    it has fewer than the largest.

    Raises:
        DataError: a shard is compressed or no tar file, or there are no images.
    """
    listing = _containers(place, ".tar", 1)
    listing.why_unlabelled = f"no class in .cls or .json (looked for {', '.join(LABEL_KEYS)})"
    cut: dict[Path, int] = {}
    largest = 0

    def images() -> Iterator[_Images]:
        nonlocal largest
        for shard in listing.containers:
            samples, whole = _samples(shard, listing.left_out)
            if whole:
                largest = max(largest, len(samples.names))
            else:
                cut[shard] = len(samples.names)
            yield samples

    _fill(listing, images(), "shards")
    base = printable(listing.root)
    if not listing.files:
        raise DataError(f"{base}: no images in its {len(listing.containers)} tar file(s)")
    for shard, count in cut.items():
        line = f"{printable(shard.name)}: cut short after {count} images"
        if not largest:
            raise DataError(f"{base}: {line}, and nothing says how many are lost")
        lost = max(largest - count, 1)
        listing.lost[f"{line}, about {lost} are lost"] = lost
    return listing


def tar_reader() -> Reader:
    """What reads a member of a shard by its offset and length."""
    return _read_member


def _read_member(shard: Path, offset: int, length: int) -> BinaryIO:
    with open(shard, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _samples(shard: Path, left_out: Counter[str]) -> tuple[_Images, bool]:
    """The images of a shard in its order, with offset and length; whether it is whole.

    tarfile is trusted with nothing but the headers: members may claim any size, and what it raises
    for a hostile file is anything.
    """
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    labels: dict[str, Label] = {}
    size, end, reason = os.path.getsize(shard), 0, ""
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would hold them all
                if member.offset_data < end or member.size < 0:
                    raise tarfile.ReadError("its members overlap")
                names = member.name.split("/")
                if member.isdir() or any(map(is_ignored, filter(None, names))):
                    continue
                if not member.isfile() or member.issparse():
                    left_out["no regular file"] += 1
                    continue
                end = member.offset_data + member.size
                if end > size:
                    raise tarfile.ReadError("a member is cut short")
                stem, _, extension = names[-1].partition(".")
                key, extension = "/".join([*names[:-1], stem]), f".{extension.lower()}"
                if suffix_of(names[-1]) in suffixes():
                    if key in images:
                        left_out["second image of a sample"] += 1
                    else:
                        images[key] = (printable(member.name), (member.offset_data, member.size))
                elif extension in (".cls", ".json"):
                    file.seek(member.offset_data)
                    labels[key] = _label(file.read(min(member.size, _LABEL_BYTES)), extension)
                else:
                    left_out[suffix_of(names[-1]) or "without a suffix"] += 1
        if end + _END_BYTES > size:  # where a whole one has its end mark
            raise tarfile.ReadError("no end mark")
    except OSError as error:
        raise DataError(f"{printable(shard)}: {error.strerror or error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason and not images:
        raise DataError(
            f"{printable(shard)}: not a readable tar file (compressed or damaged; shards must be "
            f"plain tar files: {reason})"
        )
    if reason and labels and (last := next(reversed(images))) not in labels:
        del images[last]  # its label was in what is missing
    names = [f"/{name}" for name, _ in images.values()]
    return _Images(
        names, list(map(labels.get, images)), [at for _, at in images.values()]
    ), not reason


def _label(data: bytes, extension: str) -> Label:
    if extension == ".cls":
        return as_label(data)
    try:
        content = json.loads(data)
        return as_label(next(content[key] for key in LABEL_KEYS if key in content))
    except (ValueError, TypeError, StopIteration, RecursionError):
        return None


# ----------------------------------------------------------------------------------------- parquet

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
_GROUPS_HELD = 2 * LANES  # as many as --shuffle shards reads at a time


def list_parquet(place: Place) -> Listing:
    """The images of parquet files, which belong to a split by the files' names.

    As Hugging Face datasets store them: one column holds the bytes of image files, bare or as a
    struct with a field "bytes", another numbers or words, the labels. Needs pyarrow, which softcl
    does not install by itself.

    Images are read by row groups, of which the last few stay in memory: a set that fits is read
    once from front to back; one that does not is read a whole group for each image, so many small
    groups are faster than few large ones.

    Raises:
        DataError: pyarrow is absent, a file is damaged or has no column of images.
    """
    listing = _containers(place, ".parquet", 2)  # by row groups
    parquet = _parquet()

    def images() -> Iterator[_Images]:
        for table in listing.containers:
            try:
                file = parquet.ParquetFile(table)
                _image_column(table, file.schema_arrow)
                groups = [
                    file.metadata.row_group(group).num_rows
                    for group in range(file.metadata.num_row_groups)
                ]
                labels, names = _parquet_labels(file)
            except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
                reason = " ".join(str(error).split())
                raise DataError(f"{printable(table)}: cannot read: {reason}") from error
            rows = [(group, row) for group, count in enumerate(groups) for row in range(count)]
            listing.names = listing.names or names
            words = ", ".join(file.schema_arrow.names)
            listing.why_unlabelled = (
                f"none in columns {words} (looked for numbers or words in {', '.join(LABEL_KEYS)})"
            )
            yield _Images([f", row {place}" for place in range(len(rows))], labels, rows)

    _fill(listing, images(), "tables")
    if not listing.files:
        raise DataError(f"{printable(listing.root)}: its parquet files have no rows")
    return listing


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError("reading parquet files needs pyarrow: pip install pyarrow") from error
    return parquet


def parquet_reader() -> Reader:
    """What reads a row of a group of a table, and holds the last few groups."""
    parquet, lock = _parquet(), threading.Lock()

    @functools.lru_cache(_GROUPS_HELD)
    def group_of(table: Path, group: int) -> Any:
        file = parquet.ParquetFile(table)
        column = _image_column(table, file.schema_arrow)
        return file.read_row_group(group, columns=[column]).column(column)

    def read(table: Path, group: int, row: int) -> BinaryIO:
        with lock:
            value = group_of(table, group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("no bytes in this row")
        return io.BytesIO(data)

    return read


def _parquet_labels(file: Any) -> tuple[list[Label], list[str]]:
    """A file's labels, and the names of the classes where Hugging Face datasets left any."""
    schema = file.schema_arrow
    column = next((name for name in LABEL_KEYS if name in schema.names), None)
    if column is None:
        return [None] * file.metadata.num_rows, []
    labels = [as_label(v) for v in file.read(columns=[column]).column(column).to_pylist()]
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        names = content["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
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

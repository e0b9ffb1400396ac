"""Parquet files with a column of encoded images, as Hugging Face datasets store them.

The image column holds the bytes of image files, bare or as a struct with a field "bytes"; the label
column whole numbers. Needs pyarrow, which softcl does not install by itself.

Images are read by row groups, of which the last few stay in memory: a set that fits is read once
from front to back; one that does not is read a whole group for each image, so many small groups are
faster than few large ones.
"""

from __future__ import annotations

import functools
import io
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from softcl.data.image_set import DataError
from softcl.data.listing import PackedListing, printable
from softcl.data.splits import by_name

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
_GROUPS_HELD = 8


@dataclass
class ParquetListing(PackedListing):
    """Images inside parquet files; a place is (file, row group, row of the group)."""

    columns: list[str] = field(default_factory=list)  # of images, in each file

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._group = functools.lru_cache(_GROUPS_HELD)(self._read_group)

    def _read_group(self, table: int, group: int) -> Any:
        file, column = _pyarrow().ParquetFile(self.containers[table]), self.columns[table]
        return file.read_row_group(group, columns=[column]).column(column)

    def open(self, index: int) -> BinaryIO:
        table, group, row = self.places[index]
        with self._lock:
            value = self._group(table, group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("no bytes in this row")
        return io.BytesIO(data)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading parquet files needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def find(root: Path) -> list[Path]:
    """The parquet files that `root` is or holds, sorted."""
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    return sorted(path for path in root.rglob("*.parquet") if path.is_file())


def list_images(root: Path, split: str) -> ParquetListing:
    """The images of split "train", "test" or "all"; files belong to one by their names.

    Raises:
        DataError: pyarrow is absent, a file is damaged or has no column of images.
    """
    _pyarrow()
    base = root.parent if root.is_file() else root
    tables, divided = by_name(base, find(root), split)
    listing = ParquetListing(base, [], None, [], containers=tables)
    labels: list[int | None] = []
    names: list[str] = []
    for number, table in enumerate(tables):
        found, named = _index(number, table, listing)
        labels += found
        names = names or named
    if not listing.files:
        raise DataError(f"{printable(root)}: its parquet files have no rows")
    listing.set_labels(labels, names)
    if not divided:
        listing.hold_out(split, "parquet file")
    return listing


def _index(number: int, table: Path, listing: ParquetListing) -> tuple[list[int | None], list[str]]:
    """Add a file's rows to the listing; their labels, and names of the classes where it has any."""
    try:
        file = _pyarrow().ParquetFile(table)
        schema = file.schema_arrow
        listing.columns.append(_image_column(table, schema))
        label_column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        labels: list[int | None] = [None] * file.metadata.num_rows
        names: list[str] = []
        if label_column is not None:
            values = file.read(columns=[label_column]).column(label_column).to_pylist()
            labels = [v if isinstance(v, int) and v >= 0 else None for v in values]
            names = _names(schema, label_column)
        row = 0
        for group in range(file.metadata.num_row_groups):
            for place in range(file.metadata.row_group(group).num_rows):
                listing.files.append(f"{printable(table.name)}, row {row}")
                listing.places.append((number, group, place))
                row += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(table)}: cannot read: {reason}") from error
    return labels, names


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


def _names(schema: Any, column: str) -> list[str]:
    """Names of the classes from the metadata that Hugging Face datasets add; else none."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        names = content["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []

"""Columns of rows in a file: .npz, .safetensors or .parquet, written in pieces.

A column is an array whose first dimension are the rows (one that lies on the disk stays there), or
a sequence of strings. How they come back, for a table `t` that was read by

    numpy.load(file)                     t["features"], t["paths"]; json.loads(str(t["metadata"]))
    safetensors.numpy.load_file(file)    t["features"]; json.loads(bytes(t["paths"]));
                                         metadata is the file's own
    pyarrow.parquet.read_table(file)     t["features"] (lists), t["paths"]; metadata is the schema's
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from softcl.errors import ConfigError

SUFFIXES = (".npz", ".safetensors", ".parquet")
_PIECE = 8192  # rows in memory at a time
_SAFETENSORS = {"<f4": "F32", "<i8": "I64", "|u1": "U8"}  # the types that our columns have

Column = np.ndarray | Sequence[str]


def check_suffix(file: Path) -> None:
    """Refuse a file of another kind, or one whose library is absent.

    Raises:
        ConfigError: naming it.
    """
    if file.suffix not in SUFFIXES:
        raise ConfigError("out", file, f"must end with {', '.join(SUFFIXES)}")
    if file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("out", file, "needs pyarrow, which is not installed: pip install pyarrow")


def write_table(file: Path, columns: Mapping[str, Column], metadata: Mapping[str, Any]) -> None:
    """Write the columns under a temporary name, and then give the file its own.

    Raises:
        OSError: as the file system gave it, naming the file; what had the name is still there.
    """
    write = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write[file.suffix](stream, columns, metadata)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


def _pieces(column: Column, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    for start in range(0, len(column), _PIECE):
        yield np.ascontiguousarray(column[start : start + _PIECE], dtype=dtype)


def _write_npz(
    stream: BinaryIO, columns: Mapping[str, Column], metadata: Mapping[str, Any]
) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            if isinstance(column, np.ndarray):
                dtype, shape = column.dtype, column.shape
            else:  # strings have one width in NumPy
                dtype = np.dtype(f"<U{max(map(len, column), default=1)}")
                shape = (len(column),)
            _add_npy(archive, name, dtype, shape, _pieces(column, dtype))
        text = np.array(json.dumps(metadata))
        _add_npy(archive, "metadata", text.dtype, (), [text])


def _add_npy(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    pieces: Iterable[np.ndarray],
) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        for piece in pieces:
            entry.write(piece.tobytes())


def _write_safetensors(
    stream: BinaryIO, columns: Mapping[str, Column], metadata: Mapping[str, Any]
) -> None:
    """By hand, for the library's writer takes tensors that are in memory. Strings as JSON."""
    text = {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    header: dict[str, Any] = {"__metadata__": text}
    arrays, end = {}, 0
    for name, column in columns.items():
        if not isinstance(column, np.ndarray):
            column = np.frombuffer(json.dumps(list(column)).encode(), np.uint8)
        arrays[name] = column
        kind = _SAFETENSORS[column.dtype.str]
        start, end = end, end + column.nbytes
        header[name] = {"dtype": kind, "shape": column.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8
    stream.write(len(head).to_bytes(8, "little") + head)
    for column in arrays.values():
        for piece in _pieces(column):
            stream.write(piece.tobytes())


def _write_parquet(
    stream: BinaryIO, columns: Mapping[str, Column], metadata: Mapping[str, Any]
) -> None:
    import pyarrow
    from pyarrow import parquet

    def converted(column: Column) -> Any:
        if not isinstance(column, np.ndarray):
            return pyarrow.array(column, pyarrow.string())
        if column.ndim == 1:
            return pyarrow.array(column)
        flat = pyarrow.array(np.ascontiguousarray(column).reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, column.shape[1])

    text = {key: json.dumps(value) for key, value in metadata.items()}
    fields = [pyarrow.field(name, converted(column[:0]).type) for name, column in columns.items()]
    schema = pyarrow.schema(fields, metadata=text)
    with parquet.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(next(iter(columns.values()))), _PIECE):
            pieces = [converted(column[start : start + _PIECE]) for column in columns.values()]
            writer.write_table(pyarrow.Table.from_arrays(pieces, schema=schema))

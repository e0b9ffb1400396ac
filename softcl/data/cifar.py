"""CIFAR-10 and CIFAR-100 as their authors publish them, in the python and the binary layout.

    cifar-10-batches-py     data_batch_1 .. data_batch_5, test_batch, batches.meta      pickles
    cifar-100-python        train, test, meta                                           pickles
    cifar-10-batches-bin    data_batch_1.bin .. , test_batch.bin, batches.meta.txt
    cifar-100-binary        train.bin, test.bin, fine_label_names.txt

A binary record is the label (CIFAR-100: coarse, then fine) and 3072 bytes, channels first, rows
before columns; a pickle holds the same bytes as an array. Labels are the fine ones.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softcl.data.image_set import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """Where one of the four keeps what.

    label_bytes is the length of a record's labels, the last of which counts; 0 means pickles, where
    label_key names the labels and names_key, in the file `names`, the names of the classes.
    """

    statistics: str
    files: dict[str, tuple[str, ...]]
    names: str
    classes: int
    label_bytes: int = 0
    label_key: bytes = b""
    names_key: bytes = b""


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout(
        "cifar10",
        {"train": _FIVE, "test": ("test_batch",)},
        "batches.meta",
        10,
        label_key=b"labels",
        names_key=b"label_names",
    ),
    Layout(
        "cifar10",
        {"train": tuple(f"{name}.bin" for name in _FIVE), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        10,
        label_bytes=1,
    ),
    Layout(
        "cifar100",
        {"train": ("train",), "test": ("test",)},
        "meta",
        100,
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
    ),
    Layout(
        "cifar100",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        100,
        label_bytes=2,
    ),
)
# The folders inside the archives, which may be given by the name of the folder above them.
FOLDERS = ("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")


def find(root: Path) -> tuple[Path, Layout] | None:
    """The folder and the layout of a CIFAR set in `root` or directly below it, or None."""
    for folder in (root, *(root / name for name in FOLDERS)):
        for layout in LAYOUTS:
            if all((folder / file).is_file() for file in layout.files["test"]):
                if all(
                    (folder / file).is_file() for file in (*layout.files["train"], layout.names)
                ):
                    return folder, layout
    return None


def read(folder: Path, layout: Layout, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (M, 3, 32, 32) uint8, labels (M,) int64 and the names of the classes.

    Raises:
        DataError: a file is damaged; the message names it.
    """
    splits = ("train", "test") if split == "all" else (split,)
    files = [folder / name for part in splits for name in layout.files[part]]
    read_file = _read_binary if layout.label_bytes else _read_pickle
    parts = [read_file(file, layout) for file in files]
    for file, (_, labels) in zip(files, parts, strict=True):
        if len(labels) and not 0 <= labels.min() <= labels.max() < layout.classes:
            raise DataError(f"{file}: has labels outside 0 .. {layout.classes - 1}")
    images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, SIDE, SIDE)
    return images, np.concatenate([labels for _, labels in parts]), _class_names(folder, layout)


def _read_binary(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + PIXELS
    data = np.fromfile(file, dtype=np.uint8)
    if len(data) == 0 or len(data) % record:
        raise DataError(f"{file}: {len(data)} bytes are not whole records of {record} (cut short?)")
    rows = data.reshape(-1, record)
    labels = rows[:, layout.label_bytes - 1].astype(np.int64)
    return rows[:, layout.label_bytes :], labels


def _read_pickle(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    content = load_pickle(file)
    pixels, labels = content.get(b"data"), content.get(layout.label_key)
    right = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(labels, list)
    if not right or pixels.ndim != 2 or pixels.shape != (len(labels), PIXELS):
        name = layout.label_key.decode()
        raise DataError(f"{file}: not {PIXELS} bytes in 'data' for each of its {name!r}")
    try:
        return pixels, np.array(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: its labels are not whole numbers") from error


def _class_names(folder: Path, layout: Layout) -> list[str]:
    file = folder / layout.names
    if layout.label_bytes:
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    else:
        words = load_pickle(file).get(layout.names_key)
        if not isinstance(words, list) or not all(isinstance(word, bytes) for word in words):
            raise DataError(f"{file}: holds no {layout.names_key.decode()!r}")
        names = [word.decode("utf-8", "replace") for word in words]
    if len(names) != layout.classes:
        raise DataError(f"{file}: names {len(names)} classes, expected {layout.classes}")
    return names


# What the pickled batches are made of, under numpy's names before and since version 2.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, strings, numbers and containers of them; nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        if name == "_reconstruct":
            module = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
        return super().find_class(module, name)


def load_pickle(file: Path) -> dict[bytes, Any]:
    """The dictionary in a batch or meta file, with keys in bytes.

    Raises:
        DataError: the file is damaged, holds something else, or asks for code to be run.
    """
    try:
        with open(file, "rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: cannot unpickle: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__} where a dictionary is expected")
    return {k.encode() if isinstance(k, str) else k: v for k, v in content.items()}

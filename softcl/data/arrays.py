"""Sets whose files hold raw pixels: CIFAR-10, CIFAR-100 and STL-10, as their authors publish them.

    cifar-10-batches-py     data_batch_1 .. data_batch_5, test_batch, batches.meta      pickles
    cifar-100-python        train, test, meta                                           pickles
    cifar-10-batches-bin    data_batch_1.bin .. , test_batch.bin, batches.meta.txt
    cifar-100-binary        train.bin, test.bin, fine_label_names.txt
    stl10_binary            {train,test}_{X,y}.bin, unlabeled_X.bin, class_names.txt

CIFAR: a binary record is the label (CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes, channels
first, rows before columns; a pickle holds the same bytes as an array. Labels are the fine ones.
STL-10: an image is 3 x 96 x 96 bytes, channels first, columns before rows; labels count from 1.

torchvision's readers run whatever code a pickle asks for, and know neither binary CIFAR nor which
file is damaged: hence our own.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from softcl.data.image_set import Arrays, DataError

CIFAR_SIGNS = (
    ("data_batch_1", "batches.meta"),
    ("data_batch_1.bin", "batches.meta.txt"),
    ("train", "test", "meta"),
    ("train.bin", "test.bin", "fine_label_names.txt"),
)
STL10_SIGNS = (("train_X.bin",), ("test_X.bin",), ("unlabeled_X.bin",))
_CIFAR_PIXELS = 3 * 32 * 32
_STL10_SIDE = 96


def _bytes_of(file: Path, record: int, what: str) -> np.ndarray:
    """The file's bytes as rows (M, record), mapped into memory."""
    try:
        size = file.stat().st_size
        if size == 0 or size % record:
            raise DataError(f"{file}: {size} bytes are not whole {what} of {record} (cut short?)")
        return np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, record)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def _names(file: Path, count: int) -> list[str]:
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    return _counted(file, names, count)


def _counted(file: Path, names: list[str], count: int) -> list[str]:
    if len(names) != count:
        raise DataError(f"{file}: names {len(names)} classes, expected {count}")
    return names


# ------------------------------------------------------------------------------------------- CIFAR


def read_cifar(folder: Path, split: str) -> Arrays:
    """CIFAR-10 or CIFAR-100 in either layout; split "train", "test" or "all".

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    ten = any((folder / name).is_file() for name in ("batches.meta", "batches.meta.txt"))
    binary = (folder / ("data_batch_1.bin" if ten else "train.bin")).is_file()
    classes, prefix = (10, "") if ten else (100, "fine_")
    train = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    names = {"train": train, "test": ["test_batch" if ten else "test"]}
    chosen = [name for part in names if split in (part, "all") for name in names[part]]
    images, labels = [], []
    for name in chosen:
        file = folder / (f"{name}.bin" if binary else name)
        if binary:
            label_bytes = 1 if ten else 2
            rows = _bytes_of(file, label_bytes + _CIFAR_PIXELS, "records")
            pixels, found = rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64)
        else:
            pixels, found = _pickled_batch(file, f"{prefix}labels")
        if len(found) and not 0 <= found.min() <= found.max() < classes:
            raise DataError(f"{file}: has labels outside 0 .. {classes - 1}")
        images.append(pixels)
        labels.append(found)
    if binary:
        words = _names(folder / ("batches.meta.txt" if ten else "fine_label_names.txt"), classes)
    else:
        file = folder / ("batches.meta" if ten else "meta")
        words = _counted(file, _pickled_names(file, f"{prefix}label_names"), classes)
    stacked = np.concatenate(images).reshape(-1, 3, 32, 32)
    return Arrays(stacked, np.concatenate(labels), words, f"cifar{classes}")


def _pickled_batch(file: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    content = load_pickle(file)
    pixels, labels = content.get(b"data"), content.get(label_key.encode())
    right = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(labels, list)
    if not right or pixels.shape != (len(labels), _CIFAR_PIXELS):
        raise DataError(
            f"{file}: not {_CIFAR_PIXELS} bytes in 'data' for each of its {label_key!r}"
        )
    try:
        return pixels, np.array(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: its labels are not whole numbers") from error


def _pickled_names(file: Path, key: str) -> list[str]:
    words = load_pickle(file).get(key.encode())
    if not isinstance(words, list) or not all(isinstance(word, bytes) for word in words):
        raise DataError(f"{file}: holds no {key!r}")
    return [word.decode("utf-8", "replace") for word in words]


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


# ------------------------------------------------------------------------------------------ STL-10


def read_stl10(folder: Path, split: str) -> Arrays:
    """STL-10; split "train", "test", "all", "unlabeled" or "train+unlabeled", which has no labels.

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    parts = {"all": ("train", "test")}.get(split, tuple(split.split("+")))
    record = 3 * _STL10_SIDE**2
    stacks = [_bytes_of(folder / f"{part}_X.bin", record, "images") for part in parts]
    images = np.empty((sum(map(len, stacks)), 3, _STL10_SIDE, _STL10_SIDE), dtype=np.uint8)
    start = 0
    for stack in stacks:  # one by one, because the unlabeled images alone are 2.8 GB
        columns_first = stack.reshape(-1, *images.shape[1:])
        images[start : start + len(stack)] = columns_first.transpose(0, 1, 3, 2)
        start += len(stack)
    if "unlabeled" in parts:
        return Arrays(images, None, [], "stl10")
    labels = []
    for part, stack in zip(parts, stacks, strict=True):
        file = folder / f"{part}_y.bin"
        found = _bytes_of(file, 1, "labels")[:, 0]
        if len(found) != len(stack) or found.min() < 1 or found.max() > 10:
            raise DataError(f"{file}: not {len(stack)} labels from 1 to 10")
        labels.append(found.astype(np.int64) - 1)
    file = folder / "class_names.txt"
    names = _names(file, 10) if file.is_file() else [str(number) for number in range(1, 11)]
    return Arrays(images, np.concatenate(labels), names, "stl10")

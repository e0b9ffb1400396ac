"""STL-10 as its authors publish it: stl10_binary, raw bytes.

    train_X.bin, train_y.bin      5,000 images with labels
    test_X.bin, test_y.bin        8,000 images with labels
    unlabeled_X.bin               100,000 images without
    class_names.txt

An image is 3 x 96 x 96 bytes, channels first, columns before rows; labels count from 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softcl.data.image_set import DataError

SIDE = 96
PIXELS = 3 * SIDE * SIDE
FOLDER = "stl10_binary"
SPLITS = {
    "train": ("train",),
    "test": ("test",),
    "all": ("train", "test"),
    "unlabeled": ("unlabeled",),
    "train+unlabeled": ("train", "unlabeled"),
}
PRETRAINING = "train+unlabeled"  # the split meant for training without labels


def find(root: Path) -> Path | None:
    """The folder of an STL-10 set, `root` or the one in it, or None."""
    for folder in (root, root / FOLDER):
        if any((folder / f"{part}_X.bin").is_file() for part in ("train", "test", "unlabeled")):
            return folder
    return None


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Images (M, 3, 96, 96) uint8, labels (M,) int64 (None if any have none), class names.

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    parts = SPLITS[split]
    counts = [_count(folder / f"{part}_X.bin") for part in parts]
    images = np.empty((sum(counts), 3, SIDE, SIDE), dtype=np.uint8)
    start = 0
    for part, count in zip(parts, counts, strict=True):
        raw = np.memmap(folder / f"{part}_X.bin", dtype=np.uint8, mode="r")
        columns_first = raw.reshape(count, 3, SIDE, SIDE)
        np.copyto(images[start : start + count], columns_first.transpose(0, 1, 3, 2))
        start += count
    if "unlabeled" in parts:
        return images, None, []
    labels = [
        _read_labels(folder / f"{part}_y.bin", count)
        for part, count in zip(parts, counts, strict=True)
    ]
    return images, np.concatenate(labels), _class_names(folder)


def _count(file: Path) -> int:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if size == 0 or size % PIXELS:
        raise DataError(f"{file}: {size} bytes are not whole images of {PIXELS} (cut short?)")
    return size // PIXELS


def _read_labels(file: Path, count: int) -> np.ndarray:
    try:
        labels = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if len(labels) != count or labels.min() < 1 or labels.max() > 10:
        raise DataError(f"{file}: not {count} labels from 1 to 10")
    return labels.astype(np.int64) - 1


def _class_names(folder: Path) -> list[str]:
    file = folder / "class_names.txt"
    if not file.is_file():
        return [str(number) for number in range(1, 11)]
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if len(names) != 10:
        raise DataError(f"{file}: names {len(names)} classes, expected 10")
    return names

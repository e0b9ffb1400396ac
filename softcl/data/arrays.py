"""Sets whose files hold raw pixels: CIFAR, STL-10 and MNIST as published, and NumPy's arrays.

    cifar-10-batches-py     data_batch_1 .. data_batch_5, test_batch, batches.meta      pickles
    cifar-100-python        train, test, meta                                           pickles
    cifar-10-batches-bin    data_batch_1.bin .. , test_batch.bin, batches.meta.txt
    cifar-100-binary        train.bin, test.bin, fine_label_names.txt
    stl10_binary            {train,test}_{X,y}.bin, unlabeled_X.bin, class_names.txt
    MNIST and its like      {train,t10k}-images-idx3-ubyte, {train,t10k}-labels-idx1-ubyte
    .npz, or .npy in one folder    arrays of images, and of labels, whose names say of which part

CIFAR: a binary record is the label (CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes, channels
first, rows before columns; a pickle holds the same bytes as an array. Labels are the fine ones.
STL-10: an image is 3 x 96 x 96 bytes, channels first, columns before rows; labels count from 1.
idx: two zeros, the type of an element (8: uint8), the number of dimensions, each dimension as a
big-endian word of 32 bits, and the elements.

torchvision's readers run whatever code a pickle asks for, and know neither binary CIFAR nor which
file is damaged: hence our own.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softcl.data.depth import eight_bits, scale_of
from softcl.data.image_set import Arrays, printable
from softcl.data.splits import Label, as_label, choose, part_in
from softcl.errors import DataError

CIFAR_SIGNS = (  # any file of CIFAR-10 will do: the reader says which are missing
    ("data_batch_[1-5]",),
    ("batches.meta",),
    ("data_batch_[1-5].bin",),
    ("batches.meta.txt",),
    ("train", "meta"),
    ("test", "meta"),
    ("train.bin", "fine_label_names.txt"),
    ("test.bin", "fine_label_names.txt"),
)
IDX_SIGNS = (("*-images*idx3-ubyte",),)
NUMPY_SIGNS = (("*images*.npy",), ("[xX]_*.npy",), ("*_[xX].npy",), ("[xX].npy",))
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
    have = sorted(file.name for file in folder.iterdir() if file.is_file())
    ten = any(name.startswith(("data_batch_", "batches.meta")) for name in have)
    binary = any(name.endswith((".bin", ".txt")) for name in have)
    classes, prefix = (10, "") if ten else (100, "fine_")
    train = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    names = {"train": train, "test": ["test_batch" if ten else "test"]}
    chosen = [name for part in names if split in (part, "all") for name in names[part]]
    if binary:
        meta = "batches.meta.txt" if ten else "fine_label_names.txt"
        chosen = [f"{name}.bin" for name in chosen]
    else:
        meta = "batches.meta" if ten else "meta"
    missing = [name for name in (*chosen, meta) if name not in have]
    if missing:
        what = f"CIFAR-{classes} without {', '.join(missing)}"
        raise DataError(f"{printable(folder)}: {what} (there are {', '.join(have[:12])})")
    images, labels = [], []
    for name in chosen:
        file = folder / name
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
    file = folder / meta
    words = (
        _names(file, classes)
        if binary
        else _counted(file, _pickled_names(file, f"{prefix}label_names"), classes)
    )
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


class _Dtype:
    """Stands in for numpy.dtype: a word for the type, and the order of its bytes.

    numpy's own would take flags from the file, and with them believe that bytes are pointers.
    """

    def __init__(self, word: Any, *_: Any) -> None:
        self.word = word.decode("latin1") if isinstance(word, bytes) else str(word)
        self.order = "|"

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else str(order)

    def plain(self) -> np.dtype:
        if self.word not in ("u1", "i1", "i2", "i4", "i8") or self.order not in ("|", "<", ">"):
            raise pickle.UnpicklingError(f"an array of type {self.word[:20]!r}, not of integers")
        return np.dtype(self.word).newbyteorder(self.order)


class _Array:
    """Stands in for numpy.ndarray: uint8 or integers, whose bytes are copied from the file."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        order = "F" if fortran else "C"
        if not (isinstance(kind, _Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("an array that is not made of bytes")
        self.array = np.frombuffer(data, kind.plain()).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes; codecs.encode would compress and expand too."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


# What the pickled batches are made of, under numpy's names before and since version 2.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


# The one written in Python: the other would reserve memory by a number from the file.
class _Unpickler(pickle._Unpickler):
    """Unpickles arrays of integers, strings, numbers and containers of them; runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


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
        raise DataError(f"{file}: cannot unpickle: {reason[:200]}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__} where a dictionary is expected")
    return {
        k.encode() if isinstance(k, str) else k: v.array if isinstance(v, _Array) else v
        for k, v in content.items()
    }


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


# -------------------------------------------------------------------------------- arrays with names


def read_idx(folder: Path, split: str) -> Arrays:
    """MNIST and its like; split "train", "test" or "all".

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and "-ubyte" in file.name]
    found = {file.name: _idx(file) for file in files if not file.name.endswith(".gz")}
    return _paired(folder, found, split)


def _idx(file: Path) -> np.ndarray:
    try:
        with open(file, "rb") as stream:
            start = stream.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 4:
                raise DataError(f"{printable(file)}: not an idx file of uint8")
            shape = np.frombuffer(stream.read(4 * start[3]), ">u4").astype(np.int64).tolist()
        offset = 4 + 4 * start[3]
        return np.memmap(file, np.uint8, "r", offset, tuple(shape))
    except (OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(file)}: cannot read: {reason} (cut short?)") from error


def read_numpy(path: Path, split: str) -> Arrays:
    """The arrays of an .npz file, or of the .npy files of a folder; "train", "test" or "all".

    Raises:
        DataError: a file is damaged, or its arrays are none of images.
    """
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as content:
                found = {name: content[name] for name in content.files}
        else:
            files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
            files = [file for file in files if file.is_file()]
            found = {file.stem: np.load(file, "r", allow_pickle=False) for file in files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{printable(path)}: cannot read: {reason[:200]}") from error
    return _paired(path, found, split)


def _paired(path: Path, arrays: Mapping[str, np.ndarray], split: str) -> Arrays:
    """Images (M, H, W) or (M, H, W, 3), or channels first, with the labels (M,) of their part."""
    pixels: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.dtype.kind in "uif" and array.ndim in (3, 4) and 0 not in array.shape:
            held, what = pixels, "images"
        elif array.dtype.kind in "uiUS" and array.ndim == 1 + (array.shape[1:] == (1,)):
            held, what, array = labels, "labels", array.reshape(-1)
        else:
            continue
        part = part_in(name)
        if part in held:
            raise DataError(f"{printable(path)}: several arrays of {what} of part {part!r}")
        held[part] = array
    shapes = {name: array.shape for name, array in arrays.items()}
    if not pixels:
        known = ", ".join(f"{printable(name)} {shape}" for name, shape in list(shapes.items())[:8])
        raise DataError(f"{printable(path)}: no array of images (N, H, W[, 3]) among {known}")
    parts: list[str] = []
    words: list[Label] = []
    for part, stack in pixels.items():
        own = labels.get(part)
        if own is not None and len(own) != len(stack):
            raise DataError(
                f"{printable(path)}: {len(own)} labels for {len(stack)} images of {part!r}"
            )
        parts += [part] * len(stack)
        words += [None] * len(stack) if own is None else [as_label(v) for v in own.tolist()]
    names = ", ".join(map(printable, list(shapes)[:8]))
    chosen = choose(path, split, parts, words, (), f"no array of them among {names}")
    images, notes = _chosen(path, list(pixels.values()), chosen.places)
    return Arrays(images, chosen.labels, chosen.classes, None, chosen.notes + notes)


def _chosen(
    path: Path, stacks: Sequence[np.ndarray], places: Sequence[int]
) -> tuple[np.ndarray, list[str]]:
    """The images of some places among all the stacks together, uint8 (M, 3, H, W); their scale."""
    largest: dict[bool, float] = {}
    for stack in stacks:
        if stack.dtype != np.uint8:
            floating = stack.dtype.kind == "f"
            top = stack[np.isfinite(stack)] if floating else stack
            largest[floating] = max(float(top.max(initial=0)), largest.get(floating, 0.0))
    white, notes = scale_of(largest)
    wanted, start, found = np.asarray(places), 0, []
    for stack in stacks:
        rows = wanted[(wanted >= start) & (wanted < start + len(stack))] - start
        start += len(stack)
        if not len(rows):
            continue
        chosen = stack[rows]
        if chosen.ndim == 3:
            chosen = chosen[:, None]
        elif chosen.shape[1] not in (1, 3):
            chosen = chosen.transpose(0, 3, 1, 2)
        if chosen.shape[1] not in (1, 3):
            raise DataError(
                f"{printable(path)}: images of shape {stack.shape[1:]}, not (H, W[, 3])"
            )
        chosen = chosen if chosen.dtype == np.uint8 else eight_bits(chosen, white)
        found.append(np.broadcast_to(chosen, (len(chosen), 3, *chosen.shape[2:])))
    if len({images.shape[1:] for images in found}) > 1:
        raise DataError(f"{printable(path)}: its parts have images of different sizes")
    return np.concatenate(found), notes

"""Image sets of what Python has at hand: tensors, arrays, and data sets with indices.

A data set's items are images of Pillow or arrays, alone, or first in a tuple with the label second,
or by name in a dictionary (``image`` or ``img``; ``label``), as those of torchvision and of Hugging
Face ``datasets`` are. They go the way of image files: small ones of one size are kept as they are,
others as centred squares, with random crops of the whole images; unreadable ones, up to 1 %, are
replaced.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcl.data import sets
from softcl.data.cache import Cache
from softcl.data.columns import Names, Words
from softcl.data.decode import ORIENTATION, LazyImages, pillow
from softcl.data.image_set import STATISTICS, ImageSet, Listing
from softcl.errors import DataError

IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")
# Without loss, the quickest first; TIFF for the other modes.
_FORMATS = {"RGB": "PPM", "L": "PPM", **dict.fromkeys(("1", "LA", "P", "RGBA", "I;16"), "PNG")}
_STATISTICS = "imagenet"  # of sets that nobody published constants for


def image_set_of(
    data: Any, *, image_size: int | None = None, workers: int | None = None
) -> ImageSet:
    """The image set of an object.

    Args:
        data: an `ImageSet`; uint8 pixels, a tensor (M, 3, H, W) or an array (M, H, W, 3); or a data
            set with ``len`` and indices.
        image_size: as in `load_dataset`.
        workers: threads that read a data set; more than the default 1 only if it can be read by
            several at once.

    Raises:
        DataError: it is none of these, is empty, or its images cannot be read.
    """
    if isinstance(data, ImageSet):
        return dataclasses.replace(data)  # a run moves its images to the device
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return _resident(_pixels(data), None, [], f"{len(data)} given images")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"{name_of(data)}: must be a path, uint8 images, an ImageSet, or a data set with len() "
            "and indices"
        )
    if len(data) == 0:
        raise DataError(f"{name_of(data)}: holds no images")
    return _read_dataset(data, image_size, 1 if workers is None else workers)


def name_of(given: Any) -> str:
    """What stands for an object in a configuration, which is text."""
    return f"<{type(given).__name__}>"


def is_object(word: str | None) -> bool:
    """Whether a setting stands for an object."""
    return word is not None and word.startswith("<") and word.endswith(">")


def _pixels(data: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (M, 3, H, W)."""
    shape = tuple(data.shape)
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"{name_of(data)}: images must be uint8 of shape (M, 3, H, W), got "
            f"{str(images.dtype).removeprefix('torch.')} of shape {shape}"
        )
    if images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.shape[1] != 3 or 0 in shape:
        raise DataError(f"{name_of(data)}: images must have shape (M, 3, H, W), got {shape}")
    return images.detach()


def _resident(
    images: torch.Tensor, labels: torch.Tensor | None, classes: list[str], name: str
) -> ImageSet:
    mean, std = STATISTICS[_STATISTICS]
    return ImageSet(images, labels, classes, mean, std, name, data_format="given")


# ------------------------------------------------------------------------------------- data sets


class _Items:
    """The images of a data set as files in memory, and the labels that were seen on the way."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.labels: dict[int, int | None] = {}  # of those that could be read

    def open(self, index: int) -> io.BytesIO:
        image, label = _parted(self.data[index])
        file = _as_file(image)
        self.labels[index] = label
        return file


def _parted(item: Any) -> tuple[Any, int | None]:
    """The image and the label of an item."""
    label = None
    if isinstance(item, Mapping):
        names = [key for key in IMAGE_KEYS if key in item]
        if not names:
            raise DataError(f"an item has {', '.join(map(str, item))}, but no 'image'")
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
        item = item[names[0]]
    elif isinstance(item, (tuple, list)):
        if not item:
            raise DataError("an item is empty")
        item, label = item[0], item[1] if len(item) > 1 else None
    if isinstance(label, (torch.Tensor, np.ndarray, np.generic)):
        label = label.item() if label.ndim == 0 else None
    is_class = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return item, label if is_class else None


def _as_file(image: Any) -> io.BytesIO:
    """An image as a file without compression, which costs a copy of it."""
    Image = pillow()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_as_array(image))
    if image.getexif().get(ORIENTATION, 1) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    kind = _FORMATS.get(image.mode, "TIFF")
    file = io.BytesIO()
    image.save(file, format=kind, **({"compress_level": 0} if kind == "PNG" else {}))
    file.seek(0)
    return file


def _as_array(image: Any) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of an array, also of a channels-first one or one in [0, 1]."""
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise DataError(f"an item is a {type(image).__name__}, not an image")
    array = np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
        raise DataError(f"an item has shape {tuple(image.shape)}, which is no image's")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f" or not (0.0 <= array.min() and array.max() <= 1.0):
        raise DataError(
            f"an item has {array.dtype} values from {array.min():g} to {array.max():g}: give "
            "uint8, or values in [0, 1], before any normalisation"
        )
    return (array * 255.0 + 0.5).astype(np.uint8)


def _read_dataset(data: Any, image_size: int | None, workers: int) -> ImageSet:
    items, count, name = _Items(data), len(data), name_of(data)
    listed = _listed_labels(data)
    if listed is not None and len(listed) != count:
        listed = None
    listing = Listing(
        root=Path(name),
        files=Names.of(f"item {index}" for index in range(count)),
        parts=Words([""], np.zeros(count, np.int32)),
        labels=Words.of([None] * count if listed is None else listed),
        containers=[Path(name)],
        places=np.arange(count)[:, None] * [0, 1, 0],
        read=lambda _, index, __: items.open(index),
    )
    try:
        items.open(0)  # what is wrong with all of them is said in its own words
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        why = first if isinstance(error, DataError) else f"{type(error).__name__}: {first}"
        raise DataError(f"{name}: item 0 cannot be read: {why}") from error
    content = sets.decoded(listing, "all", image_size, None, workers, Cache("off"))
    if not isinstance(content["images"], LazyImages):  # every item was read
        kept = sorted(items.labels)
        labels = [(listed or items.labels)[place] for place in kept]
    else:
        labels = listed or [None] * count
    content["classes"] = _class_names(data, labels)
    content["labels"] = None
    if content["classes"]:
        content["labels"] = torch.tensor([-1 if label is None else label for label in labels])
    mean, std = STATISTICS[_STATISTICS]
    return ImageSet(mean=mean, std=std, name=name, data_format="given", **content)


def _listed_labels(data: Any) -> list[int] | None:
    """The labels that a data set lists apart from its images; None where it does not."""
    for source in (getattr(data, "targets", None), getattr(data, "labels", None)):
        if source is not None and not callable(source):
            return _as_labels(source)
    for key in LABEL_KEYS:
        if key in (getattr(data, "column_names", None) or ()):
            return _as_labels(data[key])
    return None


def _as_labels(source: Any) -> list[int] | None:
    try:
        labels = torch.as_tensor(list(source))
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.ndim != 1 or labels.is_floating_point() or (len(labels) and labels.min() < 0):
        return None
    return labels.tolist()


def _class_names(data: Any, labels: list[int | None]) -> list[str]:
    """Names for the labels: the data set's own where it has as many as there are."""
    count = max((label for label in labels if label is not None), default=-1) + 1
    names = getattr(data, "classes", None)
    if count and isinstance(names, (list, tuple)) and len(names) >= count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]

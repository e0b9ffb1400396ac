"""Parts of a decoded image, each resized, by the compiled kernel (csrc/cpu/views) or by Pillow.

The filter is Pillow's bilinear one, which is torchvision's with antialias=True, over the pixels
that the part touches. Pillow rounds to 8 bits between the two axes and the kernel does not, so that
some values differ by one level of 255. On every instruction set the kernel gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from softcl import native

if TYPE_CHECKING:
    from PIL import Image


class Box(NamedTuple):
    """A part of an image, in pixels; fractions count."""

    top: float
    left: float
    height: float
    width: float


def cut_boxes(image: Image.Image, boxes: Sequence[Box], results: Sequence[np.ndarray]) -> None:
    """Write the boxes of an RGB image to the results, uint8 (3, rows, columns), resized to that.

    The kernel reads Pillow's own memory, and runs without the interpreter's lock.
    """
    for result in results:
        assert result.dtype == np.uint8 and result.ndim == 3 and len(result) == 3
        assert result.flags.c_contiguous
    module, _ = native.load_for_cpu()
    if module is None:
        for box, result in zip(boxes, results, strict=True):
            result[:] = _by_pillow(image, box, result.shape[1:])
        return
    address, _keep = _pixels(image, module)
    module.cpu_crops(
        pixels=address,
        height=image.height,
        width=image.width,
        boxes=[
            (*box, *result.shape[1:], _address(result))
            for box, result in zip(boxes, results, strict=True)
        ],
    )


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _pixels(image: Image.Image, module: ModuleType) -> tuple[int, object]:
    """The address of an RGB image's pixels (H, W, 4), and what keeps them there."""
    try:
        _, capsule = image.__arrow_c_array__()
        return module.arrow_bytes(capsule, 4 * image.width * image.height), capsule
    except (AttributeError, ValueError):  # Pillow < 11.2; or the image is in several pieces
        copy = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
        return _address(copy), copy


def _by_pillow(image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The box, resized to (rows, columns): (3, rows, columns)."""
    from PIL.Image import Resampling

    right = min(box.left + box.width, image.width)
    bottom = min(box.top + box.height, image.height)
    x, y = math.floor(box.left), math.floor(box.top)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (box.left - x, box.top - y, right - x, bottom - y)
    part = part.resize((size[1], size[0]), Resampling.BILINEAR, box=inside)
    return np.asarray(part).transpose(2, 0, 1)

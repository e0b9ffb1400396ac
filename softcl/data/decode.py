"""One image file to uint8 RGB pixels of a given size, whatever its mode, depth and orientation.

docs/images.md is the table of what becomes of unusual and of damaged files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
# What is opened, whatever a file is called. Pillow would run a program on some of the others: a
# PostScript file called .jpg is handed to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")


def pillow():
    """The PIL.Image module, or an ImportError that names the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading image files needs pillow: pip install 'softcl[train]'"
        ) from error
    return Image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits, and floating ones, scaled to 8 bits; others unchanged."""
    if image.mode.startswith("I;16"):
        values, full = np.asarray(image).astype(np.float64), 65535.0
    elif image.mode == "I":  # 32 bits in Pillow, 8 or 16 in nearly every file
        values = np.asarray(image).astype(np.float64)
        full = 255.0 if values.max() <= 255 else 65535.0
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        full = 1.0 if values.max() <= 1 else 255.0
    else:
        return image
    scaled = np.clip(values * (255.0 / full) + 0.5, 0, 255).astype(np.uint8)
    return pillow().fromarray(scaled)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels are laid over white, as a viewer shows them."""
    image = _eight_bit(image)
    if image.mode == "RGB":
        return image
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
        return pillow().alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    # A JPEG without an EXIF block needs no search: that would take a sixth of a small file's time.
    if image.format == "JPEG" and "exif" not in image.info:
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; an EXIF block that cannot be read counts as none."""
    from PIL import ImageOps

    try:
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    except Exception:
        return image


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of ratio width:height, resized with Pillow's bilinear filter.

    The filter sees the pixels beside that part, as when a resized image is cropped.
    """
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), pillow().Resampling.BILINEAR, box=box)


class Box(NamedTuple):
    """A part of an upright image in whole pixels, and the side of the square it is resized to."""

    top: int
    left: int
    height: int
    width: int
    side: int


def image_size(path: str | Path | BinaryIO) -> tuple[int, int]:
    """(height, width) of an upright image, from its header."""
    with pillow().open(path, formats=FORMATS) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    try:
        turned = _orientation(image) in (5, 6, 7, 8)
    except Exception:  # as in _upright
        turned = False
    return (width, height) if turned else (height, width)


def decode(path: str | Path | BinaryIO, height: int, width: int) -> np.ndarray:
    """Pixels (3, height, width) uint8 of the file; any exception means that it cannot be read."""
    with pillow().open(path, formats=FORMATS) as image:
        image.draft(
            None, (2 * width, 2 * height)
        )  # lets JPEG skip detail that a resize would discard
        image = fit(_rgb(_upright(image)), height, width)
        return np.asarray(image).transpose(2, 0, 1)


def decode_crops(
    path: str | Path | BinaryIO, draw: Callable[[int, int], Sequence[Box]]
) -> list[np.ndarray]:
    """Parts of the file's upright image, each resized to (3, side, side) uint8.

    What torchvision's resized_crop makes of an image of Pillow: the filter, bilinear, sees the
    pixels of the part alone. JPEG is decoded at a half, a quarter or an eighth where every part
    has twice its side even so.

    Args:
        draw: from the image's height and width to the boxes.

    Raises:
        Exception: any one means that the file cannot be read.
    """
    with pillow().open(path, formats=FORMATS) as image:
        height, width = _upright_size(image)
        boxes = draw(height, width)
        spare = min(min(box.height, box.width) // (2 * box.side) for box in boxes)
        longest = max(image.size)
        if spare > 1:
            image.draft(None, (image.width // spare, image.height // spare))
        scale = round(longest / max(image.size))
        image = _rgb(_upright(image))
        if image.size != (-(-width // scale), -(-height // scale)):  # it could not be turned
            boxes, scale = draw(image.height, image.width), 1
        return [_cut(image, box, scale) for box in boxes]


def _cut(image: Image.Image, box: Box, scale: int) -> np.ndarray:
    """A box of the whole image out of one that was decoded at 1 / scale."""
    left, top = box.left / scale, box.top / scale
    right, bottom = left + box.width / scale, top + box.height / scale
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    part = part.resize((box.side, box.side), pillow().Resampling.BILINEAR, box=inside)
    return np.asarray(part).transpose(2, 0, 1)

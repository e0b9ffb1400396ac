"""Image files to uint8 RGB pixels, whatever their mode, depth and orientation; one, or many.

docs/images.md is the table of what becomes of unusual and of damaged files. Which pixels come out
is a function of what is asked for: the number of threads and what was read before change nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch

from softcl.data.crops import Box, cut_boxes
from softcl.data.depth import USUAL, White, eight_bits
from softcl.data.image_set import Cut, Listing, Triple, printable
from softcl.data.recipe import draw_box
from softcl.data.walk import Progress
from softcl.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
# What is opened, whatever a file is called. Pillow would run a program on some of the others: a
# PostScript file called .jpg is handed to Ghostscript.
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA",
    "PCX", "ICO", "SGI", "SUN", "DDS", "QOI", "PSD", "XBM", "FITS",
)  # fmt: skip
UNREADABLE_LIMIT = 0.01
_CHUNK = 32  # files per task of the threads that read a whole set
_UNHEARD = logging.NullHandler()
_T = TypeVar("_T")
File = Path | BinaryIO


def pillow():
    """The PIL.Image module, or an ImportError that names the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading and writing image files needs pillow: pip install 'softcl[train]'"
        ) from error
    return Image


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow decodes here; MPO is opened as the JPEG that it starts with."""
    pillow().init()
    return tuple(name for name in FORMATS if name in pillow().OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Those of the formats that are read, in lower case."""
    known = pillow().registered_extensions()
    able = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in known.items() if name in able)


def silence() -> None:
    """Keep what Pillow and its libtiff say about odd files off the terminal.

    A file that cannot be read is counted and named by us; of one that can, nobody needs to hear.
    """
    from PIL import _imaging

    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Without a handler Python prints a logger's errors. One that the user has set is asked first.
    logging.getLogger("PIL").addHandler(_UNHEARD)
    with contextlib.suppress(OSError, AttributeError):  # libtiff is linked in, or absent
        libtiff = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
            setter = getattr(libtiff, name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey, with more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _rgb(image: Image.Image, white: White) -> Image.Image:
    """RGB; transparent pixels are laid over white, as a viewer shows them."""
    if is_deep(image):
        image = pillow().fromarray(eight_bits(np.asarray(image), white))
    if image.mode == "RGB":
        return image
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow().alpha_composite(white, image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """As EXIF says; a block that cannot be read counts as none."""
    # A JPEG without an EXIF block needs no search: that would take a sixth of a small file's time.
    if image.format == "JPEG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    except Exception:
        return image


class Probe(NamedTuple):
    """What is learned of a set from one of its images.

    height, width: upright
    floating, largest: of a grey image of more than 8 bits: whether its values are floating-point
                       numbers, and the largest; else None
    """

    height: int
    width: int
    floating: bool | None = None
    largest: float | None = None


def probe(file: File) -> Probe:
    """The size of an upright image, from its header; and how deep it is."""
    with pillow().open(file, formats=formats()) as image:
        size = _upright_size(image)
        if not is_deep(image):
            return Probe(*size)
        values = np.asarray(image)
        floating = values.dtype.kind == "f"
        return Probe(*size, floating, float(values[np.isfinite(values)].max(initial=0)))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def decode(file: File, height: int, width: int, white: White = USUAL) -> np.ndarray:
    """Pixels (3, height, width) uint8 of the file's largest centred part of that ratio.

    Any exception means that it cannot be read.
    """
    with pillow().open(file, formats=formats()) as image:
        image.draft(None, (2 * width, 2 * height))  # JPEG skips detail that a resize would discard
        image = _rgb(_upright(image), white)
        if image.size != (width, height):
            box = _centre(image.width, image.height, width / height)
            image = image.resize((width, height), pillow().Resampling.BILINEAR, box=box)
        return np.asarray(image).transpose(2, 0, 1)


def _centre(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """The largest centred part of an image that has a ratio of width to height: its box.

    Pillow's ImageOps.fit does this too, with boxes that rounding puts outside of some images.
    """
    inner_width, inner_height = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    return left, top, min(left + inner_width, width), min(top + inner_height, height)


def decode_crops(
    file: File,
    draw: Callable[[int, int], Sequence[Box]],
    results: Sequence[np.ndarray],
    white: White = USUAL,
) -> None:
    """Write parts of the file's upright image to the results, uint8 (3, side, side).

    What torchvision's resized_crop makes of it: the filter, bilinear, sees the pixels of the part
    alone. JPEG is decoded at a half, a quarter or an eighth where every part has twice its side
    even so.

    Args:
        draw: from the image's height and width to the boxes, in whole pixels.

    Raises:
        Exception: any one means that the file cannot be read.
    """
    with pillow().open(file, formats=formats()) as image:
        height, width = _upright_size(image)
        boxes = draw(height, width)
        sides = [result.shape[1] for result in results]
        spare = min(
            min(box.height, box.width) // (2 * side) for box, side in zip(boxes, sides, strict=True)
        )
        longest = max(image.size)
        if spare > 1:
            image.draft(None, (image.width // spare, image.height // spare))
        scale = round(longest / max(image.size))
        image = _rgb(_upright(image), white)
        if image.size != (-(-width // scale), -(-height // scale)):  # it could not be turned
            boxes, scale = draw(image.height, image.width), 1
        cut_boxes(image, [Box(*(x / scale for x in box)) for box in boxes], results)


# --------------------------------------------------------------------------------- many, by threads


class LazyImages:
    """A listing's images, decoded when they are asked for by a pool of threads.

    A file that turns out unreadable is replaced by the next one of the same class, listed in
    `skipped`; more than 1 % of them raise DataError. `may_pass` tells whether any was unreadable
    for a reason that may pass, the disk's or the memory's.

    Args:
        size: (height, width) of the centred part that `batch` gives.
        workers: threads; 0 for the caller's alone.
        white: the scale of grey images of more than 8 bits.
    """

    def __init__(
        self, listing: Listing, size: tuple[int, int], workers: int, white: White = USUAL
    ) -> None:
        silence()
        self.listing, self.size, self.workers, self.white = listing, size, workers, white
        self.skipped: list[str] = []
        self.may_pass = False
        self._broken: set[int] = set()
        self._lock = threading.Lock()
        self._map: Callable[..., Iterable] = map
        if workers:
            self._map = ThreadPoolExecutor(workers, thread_name_prefix="softcl-decode").map

    def __len__(self) -> int:
        return len(self.listing.files)

    def only(self, positions: Sequence[int]) -> LazyImages:
        """The same without all images but those at `positions`."""
        listing = self.listing.only(positions)
        images = LazyImages(listing, self.size, self.workers, self.white)
        images.skipped = self.skipped  # one list, whichever of the two finds a file unreadable
        return images

    @property
    def unreadable(self) -> frozenset[int]:
        """Indices of the files that were found unreadable so far."""
        with self._lock:
            return frozenset(self._broken)

    def _mark_broken(self, index: int, error: Exception) -> None:
        with self._lock:
            if index not in self._broken:
                self._broken.add(index)
                # Pillow's own errors of damaged files have no number.
                if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                    self.may_pass = True
                text = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error)).splitlines()
                reason = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
                self.skipped.append(f"{printable(self.listing.files[index])}: {reason}")

    def _refuse_if_many(self) -> None:
        lost = sum(self.listing.lost.values())
        bad, total = len(self._broken) + lost, len(self) + lost
        if bad > UNREADABLE_LIMIT * total:
            lines = [*self.listing.lost, *self.skipped]
            first = "; ".join(lines[:3]) + ("; ..." if len(lines) > 3 else "")
            raise DataError(
                f"{printable(self.listing.root)}: {bad} of {total} images cannot be read "
                f"(1% is allowed): {first}"
            )

    def _read(self, index: int, read: Callable[[File], _T]) -> _T:
        """What `read` makes of a file, or of the one that stands in for it."""
        labels = self.listing.labels
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if labels is not None and labels[candidate] != labels[index]:
                continue
            if candidate in self._broken:
                continue
            try:
                return read(self.listing.open(candidate))
            except Exception as error:
                self._mark_broken(candidate, error)
                self._refuse_if_many()
        name = printable(self.listing.files[index])
        raise DataError(f"{printable(self.listing.root)}: no readable image to replace {name}")

    def _for_each(
        self,
        function: Callable[[int, int], None],
        indices: Sequence[int],
        tick: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Call `function` with the place and the value of each index, on the threads."""
        for done, _ in enumerate(self._map(function, range(len(indices)), indices)):
            tick(done)

    def read_all(self) -> tuple[torch.Tensor, np.ndarray]:
        """All images that can be read, uint8 (M, 3, H, W), and their places (M,); see `keep`."""
        images = torch.empty((len(self), 3, *self.size), dtype=torch.uint8)
        array = images.numpy()

        def read(_: int, start: int) -> None:
            for i in range(start, min(start + _CHUNK, len(self))):
                try:
                    array[i] = decode(self.listing.open(i), *self.size, self.white)
                except Exception as error:
                    self._mark_broken(i, error)

        progress = Progress(f"reading {printable(self.listing.root)}", len(self))
        self._for_each(read, range(0, len(self), _CHUNK), lambda done: progress.tick(_CHUNK * done))
        self.skipped.sort()
        self._refuse_if_many()
        kept = np.setdiff1d(np.arange(len(self)), list(self._broken))
        return (images[kept] if self._broken else images), kept

    def keep(self, places: np.ndarray) -> None:
        """Leave all images but those at `places` out of the listing."""
        if len(places) < len(self):
            self.listing = self.listing.only(places)
        self._broken.clear()

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Centred parts of the images of indices (N,): uint8 (N, 3, H, W), in that order."""
        result = torch.empty((len(indices), 3, *self.size), dtype=torch.uint8)
        array = result.numpy()

        def read(place: int, index: int) -> None:
            array[place] = self._read(index, lambda file: decode(file, *self.size, self.white))

        self._for_each(read, indices.tolist())
        return result

    def crops(self, indices: torch.Tensor, cuts: Mapping[str, Cut]) -> dict[str, torch.Tensor]:
        """Random crops of the whole images of indices (N,): uint8 (N, 3, side, side) of each cut.

        A file is decoded once, whatever the number of cuts. The box of row i is that of
        `recipe.draw_box` for row i of the cut's numbers and the image's own height and width.
        """
        shape = (len(indices), 3)
        result = {
            name: torch.empty((*shape, cut.side, cut.side), dtype=torch.uint8)
            for name, cut in cuts.items()
        }
        arrays = [crops.numpy() for crops in result.values()]
        drawn = [(cut, cut.numbers.tolist()) for cut in cuts.values()]

        def read(place: int, index: int) -> None:
            def draw(height: int, width: int) -> list[Box]:
                return [
                    Box(*draw_box(rows[place], height, width, cut.recipe)) for cut, rows in drawn
                ]

            results = [array[place] for array in arrays]
            self._read(index, lambda file: decode_crops(file, draw, results, self.white))

        self._for_each(read, indices.tolist())
        return result


# ------------------------------------------------------------------------------------------ writing


def contact_sheet(
    images: torch.Tensor,
    path: str | Path,
    *,
    columns: int | None = None,
    enlarge: int = 1,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> None:
    """Write images (N, 3, H, W) as a PNG grid, row by row, two pixels apart, to look at.

    Either uint8, or floating in [0, 1], or views normalised with `mean` and `std`, which are
    undone. `columns` defaults to a square grid; `enlarge` repeats every pixel.
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images must have shape (N, 3, H, W), N >= 1, got {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float()
        if mean is not None and std is not None:
            images = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        images = (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    number, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows, height, width = math.ceil(number / columns), height + 2, width + 2
    sheet = torch.full((rows * height + 2, columns * width + 2, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + 2, i % columns * width + 2
        sheet[top : top + height - 2, left : left + width - 2] = image.permute(1, 2, 0)
    pillow().fromarray(sheet.numpy()).save(Path(path), format="PNG")

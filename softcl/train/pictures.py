"""The pictures of a run: the nearest neighbours of some images, and what the networks see."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from softcl.data import ImageSet, center_view, contact_sheet
from softcl.evaluation import KNN, TEMPERATURE
from softcl.evaluation.features import sampled
from softcl.ops import queue_statistics
from softcl.train.images import crop_order
from softcl.train.step import StepRandom, Transform, make_view

ROWS, COLUMNS = 10, 8  # queries, neighbours of each
_CELL, _BORDER, _GAP, _TOP, _LEFT = 64, 4, 6, 44, 110  # pixels
_GREY = (128, 128, 128)
_SHOWN = 96  # pixels that an image of the sheet of views is enlarged to at least


def choose_queries(knn: KNN, rows: int = ROWS) -> Tensor:
    """Places among the queries: the first of each class, or evenly spaced without labels."""
    count = len(knn.query_indices)
    if not knn.labelled:
        return torch.arange(min(rows, count)) * count // min(rows, count)
    labels = knn.queries.labels[knn.query_indices]
    first = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()]
    return torch.tensor(first[:rows])


def nearest(queries: Tensor, bank: Tensor, columns: int = COLUMNS) -> Tensor:
    """Places in the bank (rows, columns) of the nearest rows of each query, nearest first."""
    columns = min(columns, bank.shape[0])
    found = queue_statistics(queries, bank, TEMPERATURE, num_neighbors=columns)
    return found.neighbor_indices.cpu()


def draw_neighbors(
    path: Path,
    knn: KNN,
    places: Tensor,  # (rows,) of the queries
    panels: list[tuple[str, Tensor]],  # title, (rows, columns) places in the bank
) -> None:
    """Write a PNG: one row per query, one panel of neighbours per title.

    The border of an image has the colour of its class (grey without labels), so a row of one colour
    is a query whose neighbours are all of its class.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    side = _CELL + 2 * _BORDER
    widths = [_LEFT + side] + [tensor.shape[1] * (side + 1) for _, tensor in panels]
    width = sum(widths) + 3 * _GAP * len(widths)
    sheet = Image.new("RGB", (width, _TOP + len(places) * (side + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    query_images = _pixels(knn.queries, knn.query_indices[places])
    draw.text((_GAP, 16), "query", fill="black", font=_font(16))
    for row, image in enumerate(query_images):
        top = _TOP + row * (side + _GAP)
        label = _label(knn.queries, int(knn.query_indices[places[row]]))
        draw.text((_GAP, top + side // 2 - 8), label[0][:14], fill="black", font=_font(14))
        _paste(sheet, draw, image, (_LEFT, top), label[1])
    left = widths[0] + 3 * _GAP
    for (title, neighbors), panel_width in zip(panels, widths[1:], strict=True):
        draw.text((left, 16), title, fill="black", font=_font(16))
        _draw_panel(sheet, draw, knn, neighbors, left)
        left += panel_width + 3 * _GAP
    sheet.save(path, format="PNG")


def _draw_panel(sheet: Any, draw: Any, knn: KNN, neighbors: Tensor, left: int) -> None:
    side = _CELL + 2 * _BORDER
    for row, bank_places in enumerate(neighbors):
        indices = knn.bank_indices[bank_places]
        top = _TOP + row * (side + _GAP)
        for column, image in enumerate(_pixels(knn.bank, indices)):
            colour = _label(knn.bank, int(indices[column]))[1]
            _paste(sheet, draw, image, (left + column * (side + 1), top), colour)


def _pixels(images: Any, indices: Tensor) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).cpu().numpy() for image in images.batch(indices)]


def _label(images: Any, index: int) -> tuple[str, tuple[int, int, int]]:
    """Name and colour of an image's class."""
    if images.labels is None:
        return "", _GREY
    label, count = int(images.labels[index]), len(images.classes)
    # Hues a golden angle apart, so that neighbouring classes differ however many there are.
    hue = (label / count if count <= 12 else label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.9 if label % 2 == 0 else 0.6)
    return images.classes[label], (int(red * 255), int(green * 255), int(blue * 255))


def _paste(
    sheet: Any, draw: Any, image: np.ndarray, corner: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    from PIL import Image

    left, top = corner
    side = _CELL + 2 * _BORDER
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
    enlarged = Image.fromarray(np.ascontiguousarray(image)).resize((_CELL, _CELL))
    sheet.paste(enlarged, (left + _BORDER, top + _BORDER))


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def draw_views(
    path: Path, images: ImageSet, views: dict[str, Transform], size: int, count: int, seed: int
) -> None:
    """Write a PNG with a row for each of `count` images, drawn from the whole set.

    Columns: the whole image, then one draw of each view in the method's order, as in step 0; crops
    smaller than `size` are enlarged to it.
    """
    indices = sampled(len(images), count)
    batch = images.batch(indices).cpu()
    seen = batch if images.files is None else images.read(crop_order(indices, views, seed, 0))
    random = StepRandom(seed, 0, batch.device)
    columns = [center_view(batch, size, images.mean, images.std)]
    for name in views:
        made = make_view(views, name, seen, random(f"view {name}"))
        if made.shape[-1] != size:
            made = F.interpolate(made, size=(size, size), mode="nearest")
        columns.append(made)
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # image by image
    enlarge = max(1, -(-_SHOWN // size))
    contact_sheet(
        rows, path, columns=len(columns), enlarge=enlarge, mean=images.mean, std=images.std
    )

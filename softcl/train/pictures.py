"""The pictures of a run: the nearest neighbours of some images, and what the networks see."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softcl.data import ImageSet, center_view, contact_sheet
from softcl.evaluation import KNN, TEMPERATURE
from softcl.evaluation.features import sampled
from softcl.files import replace_file
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
    from PIL import Image, ImageDraw, ImageFont

    side = _CELL + 2 * _BORDER
    columns = [("query", knn.query_indices[places][:, None], knn.queries)]
    columns += [(title, knn.bank_indices[found], knn.bank) for title, found in panels]
    width = _LEFT + sum(indices.shape[1] * (side + 1) + 3 * _GAP for _, indices, _ in columns)
    sheet = Image.new("RGB", (width, _TOP + len(places) * (side + _GAP) + _GAP), "white")
    draw, left = ImageDraw.Draw(sheet), _LEFT
    for title, indices, images in columns:
        at = _GAP if title == "query" else left
        draw.text((at, 16), title, fill="black", font=ImageFont.load_default(16))
        for row, line in enumerate(indices.tolist()):
            top = _TOP + row * (side + _GAP)
            if title == "query":
                text, font = _class_of(images, line[0])[0][:14], ImageFont.load_default(14)
                draw.text((_GAP, top + side // 2 - 8), text, fill="black", font=font)
            for column, index in enumerate(line):
                tile = _tile(images, index)
                sheet.paste(tile, (left + column * (side + 1), top))
        left += indices.shape[1] * (side + 1) + 3 * _GAP
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    replace_file(path, stream.getvalue())


def _tile(images: ImageSet, index: int) -> Any:
    """An image, enlarged, in the colour of its class."""
    from PIL import Image, ImageOps

    (pixels,) = images.batch(torch.tensor([index])).permute(0, 2, 3, 1).cpu().numpy()
    image = Image.fromarray(pixels.copy()).resize((_CELL, _CELL))
    return ImageOps.expand(image, _BORDER, fill=_class_of(images, index)[1])


def _class_of(images: ImageSet, index: int) -> tuple[str, tuple[int, int, int]]:
    """Name and colour of an image's class."""
    if images.labels is None:
        return "", _GREY
    label, count = int(images.labels[index]), len(images.classes)
    # Hues a golden angle apart, so that neighbouring classes differ however many there are.
    hue = (label / count if count <= 12 else label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.9 if label % 2 == 0 else 0.6)
    return images.classes[label], (int(red * 255), int(green * 255), int(blue * 255))


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
    contact_sheet(
        rows,
        path,
        columns=len(columns),
        enlarge=max(1, -(-_SHOWN // size)),
        mean=images.mean,
        std=images.std,
    )

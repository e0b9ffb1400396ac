"""views.png: images of the training set and, beside each, what the method's networks see of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from softcl.data import ImageSet, center_view, contact_sheet
from softcl.evaluation.features import sampled
from softcl.training.step import StepRandom, View, make_view
from softcl.training.views import crop_order

SHEET = "views.png"
_SHOWN = 96  # pixels that an image is enlarged to at least


def draw_views(
    path: Path, images: ImageSet, views: dict[str, View], size: int, count: int, seed: int
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

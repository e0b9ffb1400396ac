"""A few training images in the views that the networks see of them."""

from __future__ import annotations

import torch

from softcl.data import center_view
from softcl.data.views import make_view
from softcl.evaluation.features import sampled
from softcl.methods import METHODS
from softcl.reporting.figures import Figure
from softcl.reporting.samples import Sets
from softcl.reporting.tiles import table_of, tile
from softcl.train.config import TrainConfig, refusal
from softcl.train.images import build_views, crop_order
from softcl.train.step import StepRandom

IMAGES, DRAWS = 6, 2  # that are shown, and how often each view of them is drawn


def draw_views(config: TrainConfig, sets: Sets) -> Figure:
    """The whole image, then draws of each of the method's views, in its order.

    Raises:
        ConfigError: the method cannot have such numbers.
    """
    try:
        method = METHODS[config.method](**config.numbers)
    except ValueError as error:
        raise refusal(config.method, error, config.numbers) from error
    images = sets.train
    views = build_views(method, images, config.image_size)
    indices = sampled(len(images), IMAGES)
    batch = images.batch(indices).cpu()
    names = ["image"]
    columns = [center_view(batch, config.image_size, images.mean, images.std)]
    for step in range(DRAWS):
        random = StepRandom(config.seed, step, batch.device)
        order = None if images.files is None else crop_order(indices, views, config.seed, step)
        seen = batch if order is None else images.read(order)
        for name in views:
            columns.append(make_view(views, name, seen, random(f"view {name}")))
            names.append(name)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (images.mean, images.std))
    rows = []
    for place in range(len(indices)):
        row = []
        for column in columns:
            pixels = (column[place].cpu() * std + mean) * 255 + 0.5
            row.append(tile(pixels.clamp(0, 255).to(torch.uint8)))
        rows.append(row)
    small = sorted({c.shape[-1] for c in columns} - {config.image_size})
    caption = f"Training images at {config.image_size} px, and {DRAWS} draws of each view of them"
    caption += f" (crops of {', '.join(map(str, small))} px are enlarged)." if small else "."
    return Figure("views", "Views as trained", caption, [table_of(rows, names)])

"""Data: image sets, and random views of their batches. Nothing here knows a loss or a network.

An image's way: sets -> formats (which one a path has) -> folder, arrays or packed (the format's
reader) -> splits (which images belong to a split, and their classes) -> decode -> stream (in which
order, ahead of time) -> recipe (a view's parameters) -> views. What the readers list and what is
decoded, kept and cache spare the next start.
"""

from softcl.data.decode import contact_sheet
from softcl.data.formats import FORMATS, find_format
from softcl.data.given import image_set_of
from softcl.data.image_set import STATISTICS, CropOrder, Cut, ImageSet
from softcl.data.recipe import RECIPES, Recipe
from softcl.data.sets import SPLITS, load_dataset, training_split
from softcl.data.shapes import make_shapes
from softcl.data.stream import batch_indices, batches
from softcl.data.views import (
    VIEWS,
    Share,
    center_view,
    describe_kernel,
    kernel_missing,
    random_view,
    strong_view,
    weak_view,
)
from softcl.errors import DataError

__all__ = [
    "FORMATS",
    "RECIPES",
    "SPLITS",
    "STATISTICS",
    "VIEWS",
    "CropOrder",
    "Cut",
    "DataError",
    "ImageSet",
    "Recipe",
    "Share",
    "batch_indices",
    "batches",
    "center_view",
    "contact_sheet",
    "describe_kernel",
    "find_format",
    "image_set_of",
    "kernel_missing",
    "load_dataset",
    "make_shapes",
    "random_view",
    "strong_view",
    "training_split",
    "weak_view",
]
